"""qmigd's tests; ``make test`` runs them."""
