#!/usr/bin/env bash
# `xl-colo remus`, as an operator of `xl remus` types it, on a PVH guest and over a command that leads to the other dom0:
# by the domain's number until it is interrupted, and by its name until the host's power is cut, after which the guest
# goes on at the other host.
# shellcheck disable=SC2016 source-path=SCRIPTDIR source=../check.sh
. "$(dirname "${BASH_SOURCE[0]}")/../check.sh"

readonly WAY='socat - TCP:10.78.0.2:7000'

# remus DOMAIN: begun in the background of host a, until the guest is protected.
remus() {
	host a "rm -f /run/remus.out; setsid xl-colo remus -i 500 -s '' $1 '$WAY' </dev/null >/run/remus.out 2>&1 &
		echo \$! >/run/remus.pid"
	wait_until 200 host a 'grep -q "pvh is protected: host b can go on with it" /run/remus.out' ||
		die "remus $1: $(host a 'cat /run/remus.out; tail -n 5 /run/a.log')"
	echo "ok: remus $1 protects"
}

nested up a b
clear_hosts pvh
start_host b '--listen 10.78.0.2:9740'
start_receiving
start_host a '--listen 10.78.0.1:9740 --guest pvh --xen /etc/xen/guests/pvh.cfg --disk-mib 16'
wait_until 200 said a pvh GUEST-READY || die "the guest did not get ready"
# remus has no letters for them.
host a 'xl-colo set heartbeat-ms=500 heartbeat-misses=40'

for wrong in 'nobody' 4711; do
	refused=$(host a "xl-colo remus -s '' $wrong '$WAY' 2>&1; echo \"code \$?\"")
	[[ $refused == *"no host here runs a guest \"$wrong\""*"code 1" ]] || die "remus $wrong says: $refused"
done
echo "ok: a domain that is none of ours is refused by its name and by its number"
refused=$(host a "xl-colo remus -s '' pvh 'socat - TCP:10.78.0.2:7001' 2>&1; echo \"code \$?\"")
[[ $refused == *"code 1" ]] || die "a way that leads nowhere: $refused"
echo "ok: a way that leads nowhere is refused: ${refused%%$'\n'*}"
holds "the dirty log is off after a refusal" is_not_logged

remus "$(host a 'xl domid pvh')"
holds "the dirty log is on" is_logged
expect "a protected write" 201 "$(put b first 'written under the first protection')"
host a 'kill -INT $(</run/remus.pid); while [[ -d /proc/$(</run/remus.pid) ]]; do sleep 0.1; done'
holds "interrupted it ends the protection" host a 'grep -q "pvh goes on here, unprotected" /run/remus.out'
holds "the dirty log is off" is_not_logged
holds "the guest runs" is_running pvh
nothing_left() { host b '! xl list pvh--incoming 2>/dev/null'; }
holds "the other host has nothing of it" wait_until 60 nothing_left

remus pvh
expect "a protected write" 201 "$(put b second 'written under the second protection')"
nested kill a
taken_over() { host b 'xl-colo status | grep -q "taken over"'; }
holds "the other host takes over" wait_until 120 taken_over
served() { [[ $(get b second) == 'written under the second protection' ]]; }
holds "the guest answers there, with its last write" wait_until 60 served
expect "and with those before" 'written under the first protection' "$(get b first)"
expect "it takes writes" 201 "$(put b third 'written after it')"
host b 'xl-colo stop; kill $(</run/receive.pid); xl destroy pvh'
