#!/bin/sh
# Sees to the programs that the host has to have, each named as an argument; a file
# that is no program is named by its path.
#
# Where this user may (root, or sudo without a password) and the host has apt, a
# missing one is installed; otherwise it is named, and the caller goes on with
# what there is.  "--python PROGRAM" wants a Python that can make environments,
# and is the one thing without which nothing goes on.

set -u

package_of() {
    case $1 in
        qemu-system-x86_64) echo qemu-system-x86 ;;
        ip) echo iproute2 ;;
        /etc/libibverbs.d/*) echo ibverbs-providers ;;
        */dist-packages/pyverbs) echo python3-pyverbs ;;
        *) echo "$1" ;;
    esac
}

as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    else
        sudo -n "$@"
    fi
}

may_install() {
    command -v apt-get >/dev/null || return 1
    [ "$(id -u)" = 0 ] || sudo -n true 2>/dev/null
}

install() {
    if ! may_install; then
        echo "Missing: $* (Debian's packages). Going on without." >&2
        return 1
    fi
    echo "Installing $* ..."
    log=$(mktemp)
    # The lists of packages may be old, or not there yet.
    if DEBIAN_FRONTEND=noninteractive as_root apt-get -q -y --no-install-recommends install "$@" >"$log" 2>&1 ||
        { as_root apt-get -q update &&
            DEBIAN_FRONTEND=noninteractive as_root apt-get -q -y --no-install-recommends install "$@"; } >>"$log" 2>&1
    then
        rm -f "$log"
    else
        tail -n 5 "$log" >&2
        rm -f "$log"
        echo "Could not install $*. Going on without." >&2
        return 1
    fi
}

if [ "${1:-}" = --python ]; then
    python=$2
    if ! command -v "$python" >/dev/null; then
        install python3 python3-venv
    fi
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        echo "qmigd needs Python 3.11 or newer; name one with PYTHON=/path/to/python3." >&2
        exit 1
    fi
    if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
        install python3-venv
        "$python" -c 'import ensurepip, venv' || exit 1
    fi
    exit 0
fi

missing=
for program in "$@"; do
    case $program in
        /*) [ -e "$program" ] ;;
        # Debian keeps some of them where an ordinary user's PATH does not lead.
        *) PATH=$PATH:/usr/sbin:/sbin command -v "$program" >/dev/null ;;
    esac || missing="$missing $(package_of "$program")"
done
# shellcheck disable=SC2086 # names of packages have no spaces
[ -z "$missing" ] || install $missing
exit 0
