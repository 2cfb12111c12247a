#!/usr/bin/env bash
# A host that loses its power is gone at once, the other one is not, and the first comes back to its place.
# shellcheck source-path=SCRIPTDIR source=../check.sh
. "$(dirname "${BASH_SOURCE[0]}")/../check.sh"

code_of() {
	local code=0
	"$@" >/dev/null 2>&1 || code=$?
	echo "$code"
}

nested up a b
holds "b answers a" host a 'ping -q -c 1 -w 20 10.78.0.2'
host a 'touch /run/before' && nested kill a
expect "a is down" 'a down' "$(nested status | grep '^a')"
expect "a command there fails, and not by its own exit code" 125 "$(code_of host a true)"
holds "b lives" host b true
expect "a does not answer b" 1 "$(code_of host b 'ping -q -c 2 -w 4 10.78.0.1')"
nested up a
holds "a started afresh" host a '[[ ! -e /run/before ]]'
holds "a answers b between the hosts" host b 'ping -q -c 1 -w 20 10.78.0.1'
holds "a answers b on the LAN" host b 'ping -q -c 1 -w 20 10.77.0.101'
nested freeze b
expect "a host that hangs does not answer" 1 "$(code_of host a 'ping -q -c 2 -w 4 10.78.0.2')"
nested thaw b
holds "and does when it wakes" host a 'ping -q -c 1 -w 20 10.78.0.2'
