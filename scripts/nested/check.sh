# For the tests of tests/; sourced, never run. A test is a script that exits 0, 1, or 77 (SKIP).
# shellcheck shell=bash
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

# shellcheck disable=SC2034 # the tests use it
readonly GUEST_URL=http://10.77.0.2

nested() {
	"$NESTED/nested" "$@"
}

# host NAME SCRIPT...
host() {
	nested run "$@"
}

# expect WHAT WANTED GOT
expect() {
	[[ $2 == "$3" ]] || die "$1: \"$3\", and not \"$2\""
	echo "ok: $1"
}

# holds WHAT COMMAND...
holds() {
	local what=$1
	shift
	"$@" || die "not so: $what"
	echo "ok: $what"
}

# said HOST GUEST TEXT: whether the guest's console has it.
said() {
	host "$1" "grep -qaE '$3' /var/log/xen/guest-$2.log"
}

# serve_disk HOST GUEST: someone else's NBD server in xl-colo's place, on a file that lives as long as dom0.
serve_disk() {
	host "$1" "mkdir -p /run/xen-colo /run/disks
		[[ -e /run/disks/$2 ]] || truncate -s 16M /run/disks/$2
		nbdkit -U /run/xen-colo/$2.disk0.sock -P /run/disks/$2.pid file /run/disks/$2"
}

unserve_disk() {
	host "$1" "kill \$(</run/disks/$2.pid); rm -f /run/disks/$2.pid /run/xen-colo/$2.disk0.sock"
}

# start_guest HOST GUEST vif|tap: with its NIC joined to the network, up to its service's first word.
start_guest() {
	host "$1" "rm -f /var/log/xen/guest-$2.log; xl create -q /etc/xen/guests/$2.cfg && lab-wire $2 $3"
	wait_until 240 said "$1" "$2" GUEST-READY || die "$2 did not get ready: $(nested console "$1" "$2" | tail -n 5)"
	echo "ok: $2 is up: $(nested console "$1" "$2" | grep -a -m1 GUEST-READY)"
}

# put HOST KEY VALUE, get HOST KEY: from the dom0 of HOST, over the LAN.
put() {
	host "$1" "curl -sS --fail --max-time 30 -o /dev/null -w '%{http_code}' -X PUT --data-binary '$3' $GUEST_URL/k/$2"
}

get() {
	host "$1" "curl -sS --fail --max-time 30 $GUEST_URL/k/$2"
}

# check_registers HOST GUEST: what guest-tool says of the processor's registers.
check_registers() {
	wait_until 90 said "$1" "$2" 'GUEST-(AVX|SSE) (ok|ERROR)' || die "$2 says nothing of its registers"
	holds "$(nested console "$1" "$2" | grep -aoE 'GUEST-(AVX|SSE) ok' | head -n 1): registers keep their values" \
		host "$1" "! grep -qaE 'GUEST-(AVX|SSE) ERROR' /var/log/xen/guest-$2.log"
}
