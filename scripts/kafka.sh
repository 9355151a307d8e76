#!/usr/bin/env bash
# The jars of the Kafka broker that the sink is tested against: fetched if they are not there; prints their directory.
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"

POM=$ROOT/aggregator/tests/flows/broker/pom.xml

directory=$CACHE/kafka/$(sha256sum "$POM" | cut -c1-16)
if [[ ! -d $directory ]]; then
    have mvn || fail "mvn was not found on PATH" "run make setup, which installs Maven"
    mkdir -p "$CACHE/kafka"
    part=$(mktemp -d "$directory.XXXXXX")
    trap 'rm -rf "$part"' EXIT
    say "fetching Kafka into $directory" >&2
    cp "$POM" "$part/pom.xml"
    (cd "$part" && mvn --batch-mode --quiet dependency:copy-dependencies -DoutputDirectory="$part/libs") >&2 ||
        fail "fetching Kafka failed" "Maven's own message is above"
    # Another run may have finished first; its jars are the same.
    mv -T "$part/libs" "$directory" 2>/dev/null || [[ -d $directory ]]
fi
echo "$directory"
