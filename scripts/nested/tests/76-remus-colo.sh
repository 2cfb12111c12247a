#!/usr/bin/env bash
# `xl-colo remus -c` on an HVM guest, as an operator tries it: what check says of the host, lock-step over a command that
# leads to the other dom0, what status and events say, and then the host's power is cut.
# shellcheck disable=SC2016 source-path=SCRIPTDIR source=../check.sh
. "$(dirname "${BASH_SOURCE[0]}")/../check.sh"

nested up a b
clear_hosts hvm
start_host b '--listen 10.78.0.2:9740'
start_receiving
start_host a '--listen 10.78.0.1:9740 --guest hvm --xen /etc/xen/guests/hvm.cfg --disk-mib 16'
wait_until 600 said a hvm GUEST-READY || die "the guest did not get ready"
# remus has no letters for them.
host a 'xl-colo set heartbeat-ms=500 heartbeat-misses=40'
checked=$(host a 'xl-colo check 10.78.0.2:9740 --guest hvm' || true)
for line in 'ok +log-dirty' 'ok +peer'; do
	grep -qE "^$line" <<<"$checked" || die "check says: $checked"
done
echo "ok: check knows the host and its peer"

host a "rm -f /run/remus.out; setsid xl-colo remus -c -s '' hvm 'socat - TCP:10.78.0.2:7000' </dev/null >/run/remus.out 2>&1 &"
wait_until 300 host a 'grep -q "hvm is protected: host b can go on with it" /run/remus.out' ||
	die "remus -c: $(host a 'cat /run/remus.out; tail -n 5 /run/a.log')"
echo "ok: remus -c protects"
expect "the mode" colo "$(host a 'xl-colo status --json' | sed -E 's/.*"mode":"([a-z]+)".*/\1/')"
expect "a write that both guests answered" 201 "$(put b first 'written in lock-step')"
holds "events tell of a checkpoint" host a 'xl-colo events a --json | grep -q "\"checkpoint\""'

nested kill a
taken_over() { host b 'xl-colo status | grep -q "taken over"'; }
holds "the other host takes over" wait_until 120 taken_over
served() { [[ $(get b first) == 'written in lock-step' ]]; }
holds "the guest answers there, with its last write" wait_until 120 served
expect "it takes writes" 201 "$(put b second 'written after it')"
host b 'xl-colo stop; kill $(</run/receive.pid); xl destroy hvm'
