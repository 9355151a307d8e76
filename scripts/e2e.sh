#!/usr/bin/env bash
# The programs of a local Kubernetes cluster, built once from the versions pinned in e2e/cluster/go.mod and kept in the cache.
#
#   scripts/e2e.sh programs   build them if they are not there, and print their directory
#
# E2E_GO_JOBS (default 2) bounds how many packages compile at a time.
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"

MODULE=$ROOT/e2e/cluster
JOBS=${E2E_GO_JOBS:-2}

main() {
    case ${1:-} in
    programs) programs ;;
    *) fail "unknown argument '${1:-}'" "usage: $0 programs" ;;
    esac
}

# Keyed by what decides the result: both module files, the version told to the programs, and the compiler.
programs() {
    have go || fail "go was not found on PATH" "the cluster's programs are built with Go 1.24 or newer: https://go.dev/dl/"
    local key directory part flags start=$SECONDS
    flags="-s -w $(version_flags)"
    key=$({
        cat "$MODULE/go.mod" "$MODULE/go.sum"
        echo "$flags"
        go env GOVERSION
    } | sha256sum | cut -c1-16)
    directory=$CACHE/cluster/$key
    if [[ ! -d $directory ]]; then
        mkdir -p "$CACHE/cluster"
        part=$(mktemp -d "$directory.XXXXXX")
        # Expanded now: the variable is gone when the trap runs.
        # shellcheck disable=SC2064
        trap "rm -rf '$part'" EXIT
        say "building the cluster's programs into $directory" >&2
        (cd "$MODULE" && CGO_ENABLED=0 GOMAXPROCS=$JOBS GOFLAGS= \
            go build -mod=readonly -p "$JOBS" -trimpath -buildvcs=false -ldflags="$flags" -o "$part/" tool) ||
            fail "building the cluster's programs from $MODULE failed" "Go's own message is above"
        # etcd's main package is its module's root, so Go names the program after the directory.
        [[ ! -f $part/server ]] || mv "$part/server" "$part/etcd"
        chmod 755 "$part"
        # Another run may have finished first; its programs are the same.
        mv -T "$part" "$directory" 2>/dev/null || [[ -d $directory ]]
        note "built in $((SECONDS - start)) s" >&2
    fi
    echo "$directory"
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
