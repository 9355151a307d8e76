#!/usr/bin/env bash
# Installs what building and testing need. Run again at any time: what is there stays, and when nothing changed since the
# last run it ends at once.
#
#   scripts/setup.sh build   compiler, bpf-linker, C tools: enough for `make build` and `make demo`
#   scripts/setup.sh         all of it: also QEMU, tshark, Go, an image engine and cargo-deny for `make test`
#
# System packages need root or sudo; everything else goes to the cache directory (EBPFCOLLECTOR_CACHE, by default
# ~/.cache/ebpf-collector) and to rustup's own place.
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"

WHAT=${1:-all}
BPF_LINKER_VERSION=0.13.0
CARGO_DENY_VERSION=0.20.2
# Fetched where there is no Go, or one that is older.
GO_VERSION=1.24.13
GO_SHA256=d2b048367a3d1a748b87f756fa06df12ce3b419e1d5f2a3612acb8950d615f9f
RUSTUP_URL=https://static.rust-lang.org/rustup/dist/x86_64-unknown-linux-gnu/rustup-init

BUILD_PACKAGES=(build-essential ca-certificates curl pkg-config iproute2)
TEST_PACKAGES=(
    debian-archive-keyring kmod qemu-system-x86 xz-utils zstd # kernels in QEMU
    conntrack dnsmasq-base iptables libcap2-bin nginx tshark  # native tests
    default-jdk-headless nodejs openssl wget                  # servers and clients of HTTP and TLS
    maven                                                     # a broker of Kafka
    python3 util-linux
    wrk                                                       # make bench
    docker.io                                                 # the image
    containerd containernetworking-plugins runc               # a local cluster
)

main() {
    case $WHAT in
    build) packages=("${BUILD_PACKAGES[@]}") ;;
    all) packages=("${BUILD_PACKAGES[@]}" "${TEST_PACKAGES[@]}") ;;
    *) fail "unknown argument $WHAT" "usage: $0 [build|all]" ;;
    esac
    if is_done; then
        return
    fi
    local start=$SECONDS
    check_platform
    install_packages
    install_rust
    install_rust_src
    install_bpf_linker
    if [[ $WHAT == all ]]; then
        install_cargo_deny
        install_go
    fi
    remember
    say "setup complete in $((SECONDS - start)) s"
}

# The stamp holds what this run would do; it is valid as long as the tools it promises are there.
stamp() { echo "$CACHE/setup-$1.stamp"; }
fingerprint() {
    cat "$ROOT/scripts/setup.sh" "$ROOT/scripts/lib.sh" "$ROOT/rust-toolchain.toml" /etc/os-release | sha256sum
    cd "$ROOT" && rustc -vV && rustc --print sysroot
}
is_done() {
    local level
    for level in "$WHAT" all; do
        if [[ -f $(stamp "$level") ]] && have bpf-linker && missing_programs >/dev/null && { [[ $level == build ]] || has_go; } &&
            [[ $(fingerprint 2>/dev/null) == "$(<"$(stamp "$level")")" ]]; then
            return 0
        fi
    done
    return 1
}
remember() {
    mkdir -p "$CACHE"
    fingerprint >"$(stamp "$WHAT")"
}

check_platform() {
    [[ $(uname -s) == Linux && $(uname -m) == x86_64 ]] ||
        fail "this is $(uname -s) on $(uname -m); building and testing need Linux on x86_64"
    local ID=unknown VERSION_ID=0 PRETTY_NAME='an unknown system'
    # shellcheck source=/dev/null
    [[ ! -f /etc/os-release ]] || . /etc/os-release
    case $ID in
    debian) ((${VERSION_ID%%.*} >= 12)) && return ;;
    ubuntu) ((${VERSION_ID%%.*} >= 22)) && return ;;
    esac
    # Nothing is lost if all of it is there already.
    if missing_programs >/dev/null; then
        return
    fi
    fail "$PRETTY_NAME is not a system this script installs packages on (Debian 12 or 13, Ubuntu 22.04 or newer)." \
        "Install what provides these programs, then run it again:" \
        "$(missing_programs | tr '\n' ' ')" \
        "On Debian they are in: ${packages[*]}"
}

# Prints the programs that are missing; true if there are none.
missing_programs() {
    local programs=(cc make curl pkg-config ip) program missing=0
    if [[ $WHAT == all ]]; then
        # Some are in directories that only root has on PATH.
        local PATH=$PATH:/usr/sbin:/sbin
        programs+=(conntrack dnsmasq java nginx node openssl wget wrk python3 containerd runc iptables nsenter unshare depmod mvn qemu-system-x86_64 xz zstd capsh tshark setpriv dockerd apt-get dpkg-deb)
    fi
    for program in "${programs[@]}"; do
        have "$program" || { echo "$program" && missing=1; }
    done
    if [[ $WHAT == all && ! -x /usr/lib/cni/bridge ]]; then
        echo "/usr/lib/cni/bridge" && missing=1
    fi
    return $missing
}

install_packages() {
    have dpkg-query && have apt-get || return 0
    local package missing=()
    for package in "${packages[@]}"; do
        [[ $(dpkg-query -W -f '${Status}' "$package" 2>/dev/null) == "install ok installed" ]] || missing+=("$package")
    done
    if ((${#missing[@]} == 0)); then
        say "system packages: all there"
        return
    fi
    # A program that came another way (an engine from its maker, say) does as well.
    if missing_programs >/dev/null && [[ $WHAT == build || -e /usr/share/keyrings/debian-archive-keyring.gpg ]]; then
        say "system packages: all programs there"
        return
    fi
    say "system packages: installing ${missing[*]}"
    local apt=(env DEBIAN_FRONTEND=noninteractive apt-get -q -o Acquire::Retries=3)
    local by_hand="apt-get install ${missing[*]}"
    can_be_root || have sudo || fail "not root, and there is no sudo" "run as root: $by_hand"
    # Services of packages are not ours to start: policy-rc.d is how Debian lets an administrator say so, and an existing
    # one is left alone.
    local policy=/usr/sbin/policy-rc.d own_policy=0
    if [[ ! -e $policy ]]; then
        own_policy=1
        printf '#!/bin/sh\nexit 101\n' | as_root tee "$policy" >/dev/null
        as_root chmod 755 "$policy"
    fi
    local status=0
    as_root "${apt[@]}" update >/dev/null &&
        as_root "${apt[@]}" install -y --no-install-recommends "${missing[@]}" | sed -n 's/^\(Setting up\|Unpacking\)/    &/p' ||
        status=$?
    ((own_policy == 0)) || as_root rm -f "$policy"
    ((status == 0)) || fail "installing packages failed" "run as root and read its messages: $by_hand"
}

is_pinned() { [[ $("$@" 2>/dev/null) == "rustc $RUST_VERSION "* ]]; }

install_rust() {
    cd "$ROOT"
    if is_pinned rustc --version && cargo clippy --version >/dev/null 2>&1 && cargo fmt --version >/dev/null 2>&1; then
        say "Rust $RUST_VERSION: there"
        return
    fi
    if ! have rustup; then
        say "Rust: installing rustup"
        local directory
        directory=$(mktemp -d)
        curl -fsSL --retry 3 -o "$directory/rustup-init" "$RUSTUP_URL" &&
            curl -fsSL --retry 3 -o "$directory/sum" "$RUSTUP_URL.sha256" &&
            [[ $(sha256sum <"$directory/rustup-init" | cut -d' ' -f1) == "$(cut -d' ' -f1 <"$directory/sum")" ]] ||
            fail "downloading rustup failed" "install Rust $RUST_VERSION with clippy, rustfmt and rust-src, then run again"
        chmod +x "$directory/rustup-init"
        "$directory/rustup-init" -y -q --no-modify-path --profile minimal --default-toolchain none
        rm -rf "$directory"
    fi
    say "Rust $RUST_VERSION: installing the toolchain"
    if rustup toolchain install "$RUST_VERSION" --profile minimal -c clippy -c rustfmt -c rust-src --no-self-update; then
        rm -f "$CACHE/env"
        return
    fi
    # No server, but the same compiler may be there under another name.
    local name
    for name in $(rustup toolchain list | cut -d' ' -f1); do
        if is_pinned rustup run "$name" rustc --version; then
            note "no server reached; the toolchain $name is the same version and is used instead."
            note "For cargo outside make: export RUSTUP_TOOLCHAIN=$name"
            mkdir -p "$CACHE"
            echo "export RUSTUP_TOOLCHAIN=$name" >"$CACHE/env"
            export RUSTUP_TOOLCHAIN=$name
            return
        fi
    done
    fail "Rust $RUST_VERSION is not installed and could not be" \
        "install it with clippy, rustfmt and rust-src: rustup toolchain install $RUST_VERSION -c clippy -c rustfmt -c rust-src"
}

# The kernel programs need `core` for a target that no library is shipped for: it is compiled from source.
install_rust_src() {
    local place
    place=$(rustc --print sysroot)/lib/rustlib/src/rust
    if [[ -f $place/library/Cargo.lock ]]; then
        say "rust-src: there"
        return
    fi
    say "rust-src: installing"
    if have rustup && rustup component add rust-src; then
        return
    fi
    note "rustup could not; taking the same source from Debian's package"
    local work list version
    work=$(mktemp -d)
    mkdir -p "$work"/{lists/partial,cache/archives/partial}
    list=$work/sources.list
    echo "deb [target=Packages signed-by=/usr/share/keyrings/debian-archive-keyring.gpg]" \
        "${EBPFCOLLECTOR_DEBIAN_MIRROR:-http://deb.debian.org}/debian trixie-backports main" >"$list"
    local apt=(-q -o "Dir::Etc::sourcelist=$list" -o Dir::Etc::sourceparts=- -o "Dir::State::lists=$work/lists"
        -o "Dir::Cache=$work/cache" -o Dir::State::status=/dev/null -o APT::Sandbox::User=root
        -o Acquire::Languages=none -o Acquire::Retries=3)
    apt-get "${apt[@]}" update >/dev/null || true
    version=$(apt-cache "${apt[@]}" madison rust-src | cut -d'|' -f2 | tr -d ' ' | grep -m1 "^$RUST_VERSION+") ||
        fail "no rust-src $RUST_VERSION at rustup's server nor in Debian" \
            "put the library source of Rust $RUST_VERSION into $place"
    (cd "$work" && apt-get "${apt[@]}" download "rust-src=$version" >/dev/null)
    rm -rf "$CACHE/rust-src" && mkdir -p "$CACHE/rust-src"
    dpkg-deb -x "$work"/rust-src_*.deb "$CACHE/rust-src"
    rm -rf "$work"
    if ! mkdir -p "$(dirname "$place")" 2>/dev/null ||
        ! ln -sfn "$CACHE/rust-src/usr/src/rustc-$RUST_VERSION" "$place" 2>/dev/null; then
        as_root mkdir -p "$(dirname "$place")"
        as_root ln -sfn "$CACHE/rust-src/usr/src/rustc-$RUST_VERSION" "$place"
    fi
    [[ -f $place/library/Cargo.lock ]] || fail "$place is not the library source after all"
}

# It must use the compiler's own LLVM, and that library is part of the toolchain: nothing else is installed for it.
install_bpf_linker() {
    if [[ $("$CACHE/bin/bpf-linker" --version 2>/dev/null) == "bpf-linker $BPF_LINKER_VERSION" ]]; then
        say "bpf-linker $BPF_LINKER_VERSION: there"
        return
    fi
    say "bpf-linker $BPF_LINKER_VERSION: compiling (about a minute)"
    local sysroot library major llvm=$CACHE/llvm
    sysroot=$(rustc --print sysroot)
    major=$(rustc -vV | sed -n 's/^LLVM version: \([0-9]*\).*/\1/p')
    library=$(find "$sysroot/lib" -maxdepth 1 -name "libLLVM.so.$major.*" -size +1M | head -n 1)
    local feature=llvm-$major from=()
    if [[ -n $library ]]; then
        rm -rf "$llvm" && mkdir -p "$llvm/lib"
        ln -s "$library" "$llvm/lib/$(basename "$library")"
        ln -s "$(basename "$library")" "$llvm/lib/libLLVM.so"
        from=(env "LLVM_PREFIX=$llvm")
    elif ! have "llvm-config-$major"; then
        fail "the compiler in $sysroot does not bring its LLVM as a shared library" \
            "install llvm-$major-dev, or the Rust toolchain from rustup, and run again"
    fi
    "${from[@]}" cargo install bpf-linker --version "$BPF_LINKER_VERSION" --locked --quiet --force \
        --no-default-features --features "$feature" --root "$CACHE"
    "$CACHE/bin/bpf-linker" --version >/dev/null || fail "bpf-linker was built but does not start"
}

install_cargo_deny() {
    if [[ $(cargo-deny --version 2>/dev/null) == "cargo-deny $CARGO_DENY_VERSION" ]]; then
        say "cargo-deny $CARGO_DENY_VERSION: there"
        return
    fi
    say "cargo-deny $CARGO_DENY_VERSION: compiling (a few minutes, once)"
    # It runs for a second per use: compile time matters, its own speed does not.
    CARGO_PROFILE_RELEASE_LTO=off CARGO_PROFILE_RELEASE_OPT_LEVEL=1 CARGO_PROFILE_RELEASE_CODEGEN_UNITS=64 \
        CARGO_PROFILE_RELEASE_DEBUG=0 \
        cargo install cargo-deny --version "$CARGO_DENY_VERSION" --locked --quiet --force --root "$CACHE"
}

# Go compiles servers and clients of the tests, and the programs of a local cluster.
has_go() {
    local version
    version=$(go env GOVERSION 2>/dev/null) || return 1
    [[ $(printf '%s\n' "go1.24" "$version" | sort -V | head -n 1) == go1.24 ]]
}

install_go() {
    if has_go; then
        say "$(go env GOVERSION): there"
        return
    fi
    local place=$CACHE/go-$GO_VERSION part name=golang.org/toolchain version=v0.0.1-go$GO_VERSION.linux-amd64 proxy
    if [[ ! -x $place/bin/go ]]; then
        say "Go $GO_VERSION: fetching the toolchain"
        # The first of the list that is a server.
        proxy=${GOPROXY:-https://proxy.golang.org}
        proxy=${proxy%%[,|]*}
        [[ $proxy == http* ]] || proxy=https://proxy.golang.org
        mkdir -p "$CACHE"
        part=$(mktemp -d "$place.XXXXXX")
        curl -fsSL --retry 3 -o "$part/zip" "${proxy%/}/$name/@v/$version.zip" ||
            fail "downloading Go $GO_VERSION failed" "install Go 1.24 or newer (https://go.dev/dl/), then run again"
        [[ $(sha256sum <"$part/zip" | cut -d' ' -f1) == "$GO_SHA256" ]] ||
            fail "what $proxy has for Go $GO_VERSION is not what it should be" "it is in $part/zip"
        python3 -m zipfile -e "$part/zip" "$part"
        # Such an archive holds no modes.
        chmod -R a+rX "$part/$name@$version"
        chmod a+x "$part/$name@$version"/bin/* "$part/$name@$version"/pkg/tool/*/*
        rm -rf "$place" && mv -T "$part/$name@$version" "$place"
        rm -rf "$part"
    fi
    mkdir -p "$CACHE/bin"
    ln -sfn "$place/bin/go" "$CACHE/bin/go"
    has_go || fail "Go $GO_VERSION was fetched but does not start"
}

main
