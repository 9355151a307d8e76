# Sourced by every script: where things are, and how to speak to the user.
# shellcheck shell=bash

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# What is costly to get and may be shared by checkouts: tools, kernels. The same rule as in node-agent/build.rs and xtask.
CACHE=${EBPFCOLLECTOR_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/ebpf-collector}

# shellcheck disable=SC2034
RUST_VERSION=$(sed -n 's/^channel = "\(.*\)"/\1/p' "$ROOT/rust-toolchain.toml")

export PATH="$CACHE/bin:${CARGO_HOME:-$HOME/.cargo}/bin:$PATH"
# Written by setup.sh where the pinned toolchain goes by another name.
if [[ -f $CACHE/env ]]; then
    # shellcheck source=/dev/null
    . "$CACHE/env"
fi

say() { printf '==> %s\n' "$*"; }
note() { printf '    %s\n' "$*"; }
fail() {
    printf 'error: %s\n' "$1" >&2
    shift
    (($# == 0)) || printf '       %s\n' "$@" >&2
    exit 1
}

have() { command -v "$1" >/dev/null 2>&1; }

# Runs a command as root. Fails with 77 if there is no way to.
as_root() {
    if ((EUID == 0)); then
        "$@"
    elif have sudo; then
        sudo "$@"
    else
        return 77
    fi
}

# True if as_root works without asking anybody.
can_be_root() { ((EUID == 0)) || { have sudo && sudo -n true 2>/dev/null; }; }
