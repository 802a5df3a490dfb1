"""Payload channels: how they are opened and accepted, and the relay that carries them."""
