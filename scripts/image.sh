#!/usr/bin/env bash
# Builds the image from the static binaries in dist/ and runs it: versions of every program, then `node-agent doctor` with
# exactly the capabilities that docs/CAPABILITIES.md lists.
#
#   scripts/image.sh [NAME:TAG]
#
# Uses the engine that runs on this machine. Where none does, starts one of its own as root, away from everything (its data
# in a temporary directory, no network set up), and stops it at the end. Exit code 77: there is no engine to use.
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"

IMAGE=${1:-ebpf-collector:dev}
# Name and number of each capability of the agent.
declare -A NUMBERS=([DAC_READ_SEARCH]=2 [NET_BROADCAST]=11 [NET_ADMIN]=12 [SYS_PTRACE]=19 [SYS_RESOURCE]=24 [PERFMON]=38 [BPF]=39)
CAPABILITIES=()

DOCKER=(docker)
# Of two clients, the one that came with the engine.
[[ ! -x /usr/bin/docker ]] || DOCKER=(/usr/bin/docker)
own='' bundle=''

main() {
    cd "$ROOT"
    [[ -x dist/node-agent && -x dist/aggregator && -x dist/operator && -f dist/ca-certificates.crt ]] ||
        fail "dist/ is not complete" "build it: cargo xtask dist"
    trap clean_up EXIT
    find_engine
    say "image: building $IMAGE from dist/"
    # BuildKit needs a plugin that not every engine has, and nothing here needs BuildKit.
    DOCKER_BUILDKIT=0 "${DOCKER[@]}" build -q --target prebuilt -t "$IMAGE" . >/dev/null
    note "$("${DOCKER[@]}" image inspect -f '{{.Size}}' "$IMAGE" | awk '{ printf "%.1f MiB", $1 / 1048576 }')," \
        "user $("${DOCKER[@]}" image inspect -f '{{.Config.User}}' "$IMAGE")"

    say "image: every program starts, as the image's own user, with nothing writable"
    local program version
    for program in node-agent aggregator operator; do
        version=$(run_image "$IMAGE" "$program" --version)
        [[ $version == *[0-9].[0-9]* ]] || fail "$program --version printed: $version"
        note "$version"
    done

    choose_capabilities
    say "image: node-agent doctor with ${CAPABILITIES[*]}"
    local report status=0
    report=$(doctor) || status=$?
    printf '%s\n' "$report"
    # 2 says that something is off or degraded, as it is on any kernel without kprobes.
    ((status == 0 || status == 2)) || fail "node-agent doctor ended with exit code $status"
    grep -q '^ebpf-net/tcp  *on ' <<<"$report" || fail "the agent in the image cannot watch TCP, see above"
    say "image: $IMAGE is good"
}

# What this machine may give: a container or virtual machine around us may have lost some.
choose_capabilities() {
    local bounding name
    bounding=$((16#$(sed -n 's/^CapBnd:[[:space:]]*//p' /proc/self/status)))
    for name in BPF PERFMON NET_ADMIN SYS_PTRACE DAC_READ_SEARCH NET_BROADCAST SYS_RESOURCE; do
        if ((bounding >> NUMBERS[$name] & 1)); then
            CAPABILITIES+=("$name")
        else
            note "this machine itself lacks CAP_$name: the agent runs without it"
        fi
    done
}

doctor() {
    local grants=() capability container
    for capability in "${CAPABILITIES[@]}"; do grants+=(--cap-add "$capability"); done
    if container=$("${DOCKER[@]}" create "${grants[@]}" "$IMAGE" node-agent 2>&1); then
        "${DOCKER[@]}" rm "$container" >/dev/null
        run_image --user 0 "${grants[@]}" --pid host --cgroupns host "$IMAGE" node-agent doctor
    elif [[ $container == *"unknown capability"* ]] && have runc && can_be_root; then
        note "this engine is older than CAP_BPF; running the image's files with runc, which is what engines use themselves"
        doctor_with_runc
    else
        fail "the engine refuses the container: $container"
    fi
}

doctor_with_runc() {
    local container list
    bundle=$(mktemp -d "${TMPDIR:-/tmp}/ebpf-collector-bundle.XXXXXX")
    mkdir "$bundle/rootfs"
    container=$("${DOCKER[@]}" create "$IMAGE" node-agent)
    "${DOCKER[@]}" export "$container" | tar -C "$bundle/rootfs" -x
    "${DOCKER[@]}" rm "$container" >/dev/null
    list=$(printf '"CAP_%s",' "${CAPABILITIES[@]}")
    list="[${list%,}]"
    # The host's process and network namespaces, as the agent's pod has them; everything read-only.
    cat >"$bundle/config.json" <<END
{
  "ociVersion": "1.0.2",
  "process": {
    "user": { "uid": 0, "gid": 0 },
    "args": ["/usr/bin/node-agent", "doctor"],
    "env": ["PATH=/usr/bin"],
    "cwd": "/",
    "capabilities": { "bounding": $list, "effective": $list, "permitted": $list },
    "noNewPrivileges": true
  },
  "root": { "path": "rootfs", "readonly": true },
  "mounts": [
    { "destination": "/proc", "type": "proc", "source": "proc" },
    { "destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755", "size=64k"] },
    { "destination": "/sys", "type": "none", "source": "/sys", "options": ["rbind", "ro", "nosuid", "noexec", "nodev"] }
  ],
  "linux": { "namespaces": [{ "type": "mount" }, { "type": "ipc" }, { "type": "uts" }] }
}
END
    as_root runc run --bundle "$bundle" "ebpf-collector-doctor-$$"
}

run_image() {
    "${DOCKER[@]}" run --rm --read-only --network host --cap-drop ALL --security-opt no-new-privileges "$@"
}

find_engine() {
    have "${DOCKER[0]}" || { note "no docker client (docker.io has one; \`make setup\` installs it)" && exit 77; }
    if "${DOCKER[@]}" info >/dev/null 2>&1; then
        say "image: using the running engine"
        return
    fi
    have dockerd || PATH=$PATH:/usr/sbin
    have dockerd || { note "no engine runs, and there is no dockerd to start (docker.io has it)" && exit 77; }
    can_be_root || { note "no engine runs, and starting one needs root or sudo without a password" && exit 77; }
    start_engine
}

start_engine() {
    own=$(mktemp -d "${TMPDIR:-/tmp}/ebpf-collector-engine.XXXXXX")
    say "image: starting an engine in $own"
    # Its own network would need address translation on the host; builds and runs here use none. vfs works on any disk.
    as_root dockerd --host "unix://$own/docker.sock" --data-root "$own/data" --exec-root "$own/exec" \
        --pidfile "$own/docker.pid" --storage-driver vfs --bridge none --iptables=false --ip6tables=false \
        --group "$(id -gn)" >"$own/log" 2>&1 &
    DOCKER+=(--host "unix://$own/docker.sock")
    local tries
    for ((tries = 0; tries < 60; tries++)); do
        if "${DOCKER[@]}" info >/dev/null 2>&1; then
            note "engine $("${DOCKER[@]}" version -f '{{.Server.Version}}')"
            return
        fi
        kill -0 $! 2>/dev/null || break
        sleep 0.5
    done
    tail -n 20 "$own/log" >&2
    note "the engine did not start; its last words are above"
    exit 77
}

clean_up() {
    local status=$? pid tries place
    if [[ -n $own ]]; then
        pid=$(as_root cat "$own/docker.pid" 2>/dev/null) || pid=
        if [[ -n $pid ]]; then
            as_root kill "$pid" 2>/dev/null || true
            for ((tries = 0; tries < 60; tries++)); do
                as_root kill -0 "$pid" 2>/dev/null || break
                sleep 0.25
            done
        fi
        # The engine leaves the mount of its network namespace behind.
        while read -r place; do as_root umount "$place" || true; done < <(awk -v d="$own/" 'index($2, d) == 1 { print $2 }' /proc/mounts)
    fi
    for place in "$own" "$bundle"; do
        [[ -z $place ]] || as_root rm -rf "$place" || note "could not remove all of $place"
    done
    exit $status
}

main
