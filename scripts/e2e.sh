#!/usr/bin/env bash
# Tests on a whole cluster: builds what they need, brings a cluster up, runs them, takes it down. See docs/E2E.md.
#
#   scripts/e2e.sh            all of it; the cluster stays up if a test failed and E2E_KEEP is set
#   scripts/e2e.sh programs   the local cluster's programs: built if they are not there; prints their directory
#   scripts/e2e.sh up         a cluster, and how to use it
#   scripts/e2e.sh test ...   the tests against the cluster that is up; arguments go to `ec-e2e test`
#   scripts/e2e.sh down       removes the cluster
#
# E2E_CLUSTER: `local` (default where kind or an engine is missing), `kind`, or `existing` (the cluster of KUBECONFIG).
# E2E_GO_JOBS (default 2) bounds how many packages of the local cluster compile at a time.
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"
cd "$ROOT"

MODULE=$ROOT/e2e/cluster
JOBS=${E2E_GO_JOBS:-2}
# Cargo profile of the image's programs.
PROFILE=${E2E_PROFILE:-release}
CLUSTER=${E2E_CLUSTER:-local}

main() {
    local command=${1:-all}
    shift || true
    case $command in
    programs) programs ;;
    up) prepare && e2e up ;;
    test) prepare && e2e test "$@" ;;
    down) cargo build --quiet -p ec-e2e && e2e down ;;
    all) prepare && e2e run "$@" ;;
    *) fail "unknown argument '$command'" "usage: $0 [programs|up|test|down]" ;;
    esac
}

e2e() { as_root target/debug/ec-e2e --cluster "$CLUSTER" "$@"; }

prepare() {
    case $CLUSTER in
    local) E2E_PROGRAMS=$(programs) && export E2E_PROGRAMS ;;
    kind | existing) ;;
    *) fail "E2E_CLUSTER is '$CLUSTER'" "it can be local, kind or existing" ;;
    esac
    cargo build --quiet -p ec-e2e
    cargo xtask dist --with-tests --profile "$PROFILE"
}

# Keyed by what decides the result: all module files, the version told to the programs, and the compiler.
programs() {
    have go || fail "go was not found on PATH" "the cluster's programs are built with Go 1.24 or newer: https://go.dev/dl/"
    local key directory flags start=$SECONDS
    flags="-s -w $(version_flags)"
    key=$({
        cat "$MODULE"/{,coredns/}go.{mod,sum} "$MODULE/coredns/main.go"
        echo "$flags"
        go env GOVERSION
    } | sha256sum | cut -c1-16)
    directory=$CACHE/cluster/$key
    if [[ ! -d $directory ]]; then
        mkdir -p "$CACHE/cluster"
        part=$(mktemp -d "$directory.XXXXXX")
        trap 'rm -rf "$part"' EXIT
        say "building the cluster's programs into $directory" >&2
        build "$MODULE" "$flags" tool
        build "$MODULE/coredns" "-s -w" .
        # etcd's main package is its module's root, so Go names the program after the directory.
        [[ ! -f $part/server ]] || mv "$part/server" "$part/etcd"
        chmod 755 "$part"
        # Some gigabytes of compiled packages, of use to an interrupted build only.
        rm -rf "$CACHE/cluster/go-build"
        # Another run may have finished first; its programs are the same.
        mv -T "$part" "$directory" 2>/dev/null || [[ -d $directory ]]
        note "built in $((SECONDS - start)) s" >&2
    fi
    echo "$directory"
}

# build MODULE FLAGS PACKAGES: without debug information, static, from the versions in go.sum.
build() {
    (cd "$1" && CGO_ENABLED=0 GOMAXPROCS=$JOBS GOFLAGS='' GOCACHE=$CACHE/cluster/go-build \
        go build -mod=readonly -p "$JOBS" -trimpath -buildvcs=false -ldflags="$2" -o "$part/" "$3") ||
        fail "building the cluster's programs from $1 failed" "Go's own message is above"
}

# Kubernetes' own build passes its version to the linker; without it the programs take each other for version 0.0.0.
version_flags() {
    local version helm major minor
    version=$(pinned k8s.io/kubernetes)
    helm=$(pinned helm.sh/helm/v3)
    IFS=. read -r major minor _ <<<"${version#v}"
    local package=k8s.io/component-base/version
    echo "-X $package.gitVersion=$version -X $package.gitMajor=$major -X $package.gitMinor=$minor" \
        "-X $package.gitTreeState=clean -X helm.sh/helm/v3/internal/version.version=$helm"
}

# The version that go.mod requires of a module.
pinned() { awk -v module="$1" '$1 == module && $2 ~ /^v/ { print $2; exit }' "$MODULE/go.mod"; }

main "$@"
