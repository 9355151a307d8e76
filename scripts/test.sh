#!/usr/bin/env bash
# Runs the test tiers and says at the end what passed, failed and was skipped.
#
#   scripts/test.sh [TIER...]     all of them, or some: fmt lint deny unit native vm image chart
#
# A tier is a function `tier_<name>` below: exit code 0 is passed, 77 skipped (its last output line says why), anything else
# failed. It reports its tests with `tally`. Every tier's output is kept in target/test/<tier>.log.
# With CI set, a skipped tier counts as failed: there, everything is supposed to run.
set -uo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"
cd "$ROOT" || exit 1

ALL_TIERS=(fmt lint deny unit native vm image chart)
KERNELS=(5.10 6.1 6.12 7.3)
VM_FEATURES=(ebpf-net/{tcp,tcp-open,tcp-older,tcp-owner,udp-sent,udp-received,udp-owner,dnsflow,httpflow} ebpf-bash/{lines,shells} bpf-netlog/{packets,namespaces})
# Tests of the agent that run in machines too: what servers, clients and tshark counted is what rows say, at each kernel. Few:
# an agent takes half a minute to start under emulation.
VM_TESTS=(
    http::rows_are_what_the_access_log_says
    http_truth::servers_in_go_are_as_they_say
    dns::rows_are_what_tshark_saw
    gotls::nginx_and_go_under_one_agent_are_as_they_say
)
# Half of what the verifier walks before it refuses a program: what grows past this is near refusal on some kernel.
INSTRUCTIONS_MAX=500000
LOGS=$ROOT/target/test
SKIPPED=77

# --- tiers ------------------------------------------------------------------------------------------------------------

tier_fmt() {
    local files
    files=$(cargo fmt --all -- --check -l) && tally passed 1 && return
    echo "not formatted (make fmt does it):"
    echo "$files"
    return 1
}

tier_lint() {
    cargo clippy --workspace --all-targets --features ec-operator/cluster-tests -- -D warnings && tally passed 1
}

tier_deny() {
    have cargo-deny || { echo "cargo-deny is not installed: make setup" && return $SKIPPED; }
    cargo-deny --log-level warn check licenses bans sources || return
    tally passed 3
    # The list of known vulnerabilities is not on crates.io; without a way to it there is nothing to check against.
    if cargo-deny --log-level error fetch db >"$LOGS/deny-fetch.log" 2>&1; then
        cargo-deny --log-level warn check --disable-fetch advisories || return
        tally passed 1
    else
        echo "advisories: the database of known vulnerabilities cannot be reached from here, not checked"
    fi
}

tier_unit() {
    cargo_tests cargo test --workspace --no-fail-fast
}

# What loads programs into this machine's kernel: tests marked #[ignore = "native: ..."], one at a time, then the exactness
# run, in which every process counts its own traffic, then the whole way to DataWay: the demo, and the chain under faults.
tier_native() {
    can_be_root || { echo "needs root, or sudo without a password" && return $SKIPPED; }
    static_binaries || return
    local status=0 topology
    EBPFCOLLECTOR_KAFKA_LIBS=$(scripts/kafka.sh) || return
    export EBPFCOLLECTOR_KAFKA_LIBS
    (
        ((EUID == 0)) || export CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER="sudo --preserve-env env PATH=$PATH"
        cargo_tests cargo test --workspace --no-fail-fast -- --ignored --test-threads=1
    ) || status=1
    for topology in veth loopback; do
        check "exactness on this kernel, $topology" \
            as_root dist/test/exactness --agent dist/node-agent --topology "$topology" || status=1
    done
    check "demo" cargo xtask demo --seconds 5 || status=1
    check "chain: aggregator killed five times, DataWay failing" chain || status=1
    check "chain: DataWay gone" chain --outage || status=1
    check "chain: TLS, strangers refused" chain --tls --seconds 15 --kills 2 || status=1
    return $status
}

# Traffic through agent and aggregator to a DataWay stub while they fail; every record has to arrive exactly once.
# Of the agent's memory 24 MiB are three rings of 4 MiB, mapped twice each.
chain() {
    as_root dist/test/chain --agent dist/node-agent --aggregator dist/aggregator --traffic dist/test/traffic \
        --memory-mib 96 "$@"
}

# The same on every kernel we promise, and what the agent says about each.
tier_vm() {
    have qemu-system-x86_64 || { echo "qemu-system-x86_64 is not installed: make setup" && return $SKIPPED; }
    static_binaries || return
    local kernel status=0
    vm_programs || return
    for kernel in "${KERNELS[@]}"; do
        check "HTTP, DNS and TLS on $kernel" vm_layers "$kernel" || status=1
        check "doctor on $kernel" vm_doctor "$kernel" || status=1
        check "exactness on $kernel" vm "$kernel" --timeout 900 --mem 2048 \
            --tool dist/node-agent --tool dist/test/traffic -- dist/test/exactness --agent /bin/node-agent || status=1
    done
    # One processor: emulation with several can trip over code that the kernel patches while it runs.
    check "clock steps on 6.12" cargo xtask vm --kernel 6.12 --timeout 300 --cpus 1 --tool dist/node-agent \
        -- dist/test/clockstep --agent /bin/node-agent --allow || status=1
    return $status
}

# vm KERNEL ARGUMENTS...: `cargo xtask vm`. Emulation with several processors can run into the breakpoint that a kernel puts
# where it patches its own code (attaching to a tracepoint does), which no real machine does: then, and only then, once more.
vm() {
    local kernel=$1 status=0 log=target/vm/$1.log
    shift
    cargo xtask vm --kernel "$kernel" "$@" || status=$?
    if ((status != 0)) && grep -aq 'Oops: int3' "$log"; then
        echo "$kernel: the emulated kernel fell over a breakpoint of its own; once more"
        status=0
        cargo xtask vm --kernel "$kernel" "$@" || status=$?
    fi
    return $status
}

# What machines have besides the agent: its tests as one program, and the servers and clients in Go.
vm_programs() {
    local programs=$ROOT/node-agent/tests built=$LOGS/programs tests
    have go || { echo "go is not installed: servers and clients of HTTP are built with it" && return $SKIPPED; }
    tests=$(cargo test -p ec-node-agent --test agent --no-run 2>&1 | sed -n 's/.*Executable.*(\(.*\))$/\1/p')
    [[ -n $tests ]] || { echo "the agent's tests were not built" && return 1; }
    # A directory for each set of arguments, as node-agent/tests/agent/gotls.rs says.
    mkdir -p "$built/-ldflags=-s -w"
    strip -o "$built/agent-tests" "$ROOT/${tests#"$ROOT/"}" &&
        cp dist/node-agent "$built/node-agent" &&
        (
            export CGO_ENABLED=0 GOFLAGS=
            cd "$programs/go/pair" && go build -o "$built/pair" . &&
                go build -o "$built/-ldflags=-s -w/pair" '-ldflags=-s -w' . &&
                cd "$programs/agent/programs" && go build -o "$built/serve.go" serve.go &&
                go build -o "$built/ask.go" ask.go &&
                cd grpc && go build -mod=readonly -o "$built/grpc" .
        )
}

# Runs VM_TESTS on a kernel, with real servers and clients and the libraries they have here.
vm_layers() {
    local kernel=$1 built=$LOGS/programs file PATH=$PATH:/usr/sbin:/sbin
    local with=(--timeout 600 --mem 3072 --env EBPFCOLLECTOR_TEST_PROGRAMS=/programs --env OPENSSL_CONF=/etc/ssl/openssl.cnf)
    for file in node-agent pair '-ldflags=-s -w/pair' serve.go ask.go grpc; do
        with+=(--file "$built/$file:/programs/$file")
    done
    for file in /etc/passwd /etc/group /etc/ssl/openssl.cnf; do
        with+=(--file "$file:$file")
    done
    for file in nginx curl openssl ip dnsmasq tshark dumpcap; do
        with+=(--tool "$file")
    done
    vm "$kernel" "${with[@]}" -- "$built/agent-tests" --ignored --exact --test-threads 1 "${VM_TESTS[@]}" || return
    # A name that no test has any more is no failure to the program.
    grep -aEq "^test result: ok. ${#VM_TESTS[@]} passed" "target/vm/$kernel.log"
}

# The agent sees every feature of this build on the kernel, and its programs are far from the verifier's limit; `doctor`
# ends with 2 if any feature is off.
vm_doctor() {
    local status=0 feature
    vm "$1" -- dist/node-agent doctor --enabled-plugins ebpf-net,ebpf-bash,bpf-netlog || status=$?
    ((status == 0 || status == 2)) || return 1
    for feature in "${VM_FEATURES[@]}"; do
        grep -Eq "^$feature +(on|degraded) " "target/vm/$1.log" || { echo "$feature is off on $1" && status=1; }
    done
    verified_instructions "$1" || status=1
    ((status != 1))
}

# No program of doctor's report comes near the verifier's limit. Kernels before 5.16 do not tell, and show 0.
verified_instructions() {
    awk -v most="$INSTRUCTIONS_MAX" -v kernel="$1" '
        $3 == "instructions" && $4 == "verified" {
            programs++
            if ($2 + 0 > most) {
                printf "%s: %d instructions verified on %s, more than %d\n", $1, $2, kernel, most
                bad = 1
            }
        }
        END {
            if (!programs) print "doctor listed no programs on " kernel
            exit bad || !programs
        }' "target/vm/$1.log"
}

tier_image() {
    static_binaries || return
    scripts/image.sh && tally passed 1
}

# The chart and the operator against a real API server with role-based access control, without nodes.
tier_chart() {
    have go || { echo "go is not installed: the API server is built with it" && return $SKIPPED; }
    CLUSTER_PROGRAMS=$(scripts/e2e.sh programs) || return
    export CLUSTER_PROGRAMS
    cargo_tests cargo test -p ec-operator --features cluster-tests --test cluster
}

# --- what tiers are made of -------------------------------------------------------------------------------------------

# tally passed|failed|skipped NUMBER
tally() { echo "$1 $2" >>"$COUNTS"; }

# Runs cargo's tests and adds up what each test binary reports.
cargo_tests() {
    local log=$LOGS/cargo-$BASHPID.log status passed failed
    "$@" 2>&1 | tee "$log"
    status=${PIPESTATUS[0]}
    read -r passed failed < <(awk '/^test result:/ { p += $4; f += $6 } END { print p + 0, f + 0 }' "$log")
    rm -f "$log"
    tally passed "$passed"
    ((failed == 0)) || tally failed "$failed"
    return "$status"
}

# A command that is one test: check NAME COMMAND...
check() {
    local name=$1
    shift
    say "$name"
    if "$@"; then
        tally passed 1
    else
        echo "FAILED: $name"
        tally failed 1
        return 1
    fi
}

# The static binaries, built once per run.
static_binaries() {
    [[ ! -e $LOGS/static-built ]] || return 0
    cargo xtask dist --with-tests && touch "$LOGS/static-built"
}

# --- running them -----------------------------------------------------------------------------------------------------

# Sums a column of a counts file.
count() { awk -v kind="$1" '$1 == kind { n += $2 } END { print n + 0 }' "$2"; }

run_tier() {
    local tier=$1 start=$SECONDS status result log=$LOGS/$1.log
    COUNTS=$LOGS/$tier.counts
    : >"$COUNTS"
    printf '\n'
    say "tier $tier"
    "tier_$tier" 2>&1 | tee "$log"
    status=${PIPESTATUS[0]}
    # A tier in which nothing ran has not passed.
    if ((status == 0 && $(count passed "$COUNTS") == 0)); then
        echo "error: nothing ran in this tier" | tee -a "$log"
        status=1
    fi
    case $status in
    0) result=PASSED ;;
    "$SKIPPED")
        result="SKIPPED: $(tail -n 1 "$log" | sed 's/^ *//')"
        tally skipped 1
        if [[ -n ${CI:-} ]]; then
            result="FAILED: skipped, which CI does not accept: ${result#SKIPPED: }"
            tally failed 1
        fi
        ;;
    *)
        result="FAILED: see ${log#"$ROOT/"}"
        (($(count failed "$COUNTS") > 0)) || tally failed 1
        ;;
    esac
    local passed failed
    passed=$(count passed "$COUNTS")
    failed=$(count failed "$COUNTS")
    [[ $result != FAILED:* ]] || FAILURES+=("$tier")
    TABLE+=("$(printf '%-7s %5d s %6d passed %4d failed   %s' "$tier" $((SECONDS - start)) "$passed" "$failed" "$result")")
    PASSED=$((PASSED + passed))
    FAILED=$((FAILED + failed))
    SKIPS=$((SKIPS + $(count skipped "$COUNTS")))
}

# What failed in a tier's log, and what it said, so that the end of the output tells.
failures() {
    say "failed in tier $1:"
    grep -aE '^(test .* FAILED$|FAILED: |error)' "$LOGS/$1.log" | head -n 20
    grep -a -A 6 ' panicked at ' "$LOGS/$1.log" | head -n 60
}

TIERS=("$@")
((${#TIERS[@]} > 0)) || TIERS=("${ALL_TIERS[@]}")
for tier in "${TIERS[@]}"; do
    declare -F "tier_$tier" >/dev/null || fail "there is no tier $tier" "tiers: ${ALL_TIERS[*]}"
done
mkdir -p "$LOGS"
rm -f "$LOGS/static-built"
PASSED=0 FAILED=0 SKIPS=0 TABLE=() FAILURES=()
for tier in "${TIERS[@]}"; do run_tier "$tier"; done

printf '\n'
for tier in "${FAILURES[@]}"; do failures "$tier"; done
printf '\n'
printf '%s\n' "${TABLE[@]}"
printf '\n%d passed, %d failed, %d skipped\n' "$PASSED" "$FAILED" "$SKIPS"
((FAILED == 0))
