# For the tests of tests/; sourced, never run. A test is a script that exits 0, 1, or 77 (SKIP).
# shellcheck shell=bash
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

# shellcheck disable=SC2034 # the tests use it
readonly GUEST_URL=http://10.77.0.2
# For tests of what is done and not of how soon: on a busy machine an emulated host may not be heard of for seconds.
# shellcheck disable=SC2034
readonly PATIENT='--heartbeat-ms 500 --heartbeat-misses 40'

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

# At once: asked to end, nbdkit answers its clients with errors for as long as they stay.
unserve_disk() {
	host "$1" "kill -KILL \$(</run/disks/$2.pid); rm -f /run/disks/$2.pid /run/xen-colo/$2.disk0.sock"
}

# start_guest HOST GUEST vif|tap: with its NIC joined to the network, up to its service's first word. NBD_DEAD_SECONDS is
# the hotplug script's.
start_guest() {
	host "$1" "rm -f /var/log/xen/guest-$2.log; NBD_DEAD_SECONDS=${NBD_DEAD_SECONDS:-} xl create -q /etc/xen/guests/$2.cfg && lab-wire $2 $3"
	# Emulated devices inside an emulated processor: each access is a trip through two hypervisors.
	wait_until 600 said "$1" "$2" GUEST-READY || die "$2 did not get ready: $(nested console "$1" "$2" | tail -n 5)"
	echo "ok: $2 is up: $(host "$1" "grep -am1 GUEST-READY /var/log/xen/guest-$2.log")"
}

# start_host NAME REST: xl-colo, until it listens; and its guest runs, if it has one. LOG (info) is its log's level, POLICY
# (alone) who says that it may go on alone.
start_host() {
	RUN_SECONDS=240 host "$1" "mkdir -p /run/disks; rm -f /run/$1.out
		XEN_COLO_LOG=${LOG:-info} setsid xl-colo host --name $1 --policy ${POLICY:-alone} --disk /run/disks/$1.img $2 \
			</dev/null >/run/$1.out 2>/run/$1.log &
		echo \$! >/run/$1.pid
		for i in \$(seq 2000); do grep -qs listens /run/$1.out && exit 0; kill -0 \$! 2>/dev/null || break; sleep 0.1; done
		cat /run/$1.log; exit 1"
}

# terminate HOST: SIGTERM, and the end of its process.
terminate() {
	host "$1" "kill -TERM \$(</run/$1.pid); for i in \$(seq 300); do [[ -d /proc/\$(</run/$1.pid) ]] || exit 0; sleep 0.1; done; exit 1"
}

# start_receiving: whoever connects to port 7000 of host b speaks to its xl-colo, as over ssh.
start_receiving() {
	host b 'setsid socat TCP-LISTEN:7000,reuseaddr,fork EXEC:"xl-colo receive",nofork </dev/null >/run/receive.log 2>&1 &
		echo $! >/run/receive.pid'
}

# clear_hosts GUEST...: ends every xl-colo and these guests, under both their names, and forgets what they said. At once: one
# that is asked to end gives a guest's devices away.
clear_hosts() {
	local each
	for each in a b; do
		host $each "kill -KILL \$(pidof xl-colo) 2>/dev/null
			for d in $*; do xl destroy \$d 2>/dev/null; xl destroy \$d--incoming 2>/dev/null
				rm -f /var/log/xen/guest-\$d.log /var/log/xen/guest-\$d--incoming.log; done
			rm -f /run/disks/*; true"
	done
}

# What the hypervisor of host a says of the paging of each domain: log_dirty is in the list while the log is on.
paging() {
	host a "xl debug-keys q; xl dmesg | grep 'paging assistance: ' | tail -n \$(xl list | tail -n +2 | wc -l)"
}

is_logged() {
	[[ $(paging) == *log_dirty* ]]
}

is_not_logged() {
	! is_logged
}

# is_running GUEST, on host a.
is_running() {
	host a "[[ \$(xl list $1 | awk 'NR == 2 { print \$5 }') =~ ^[rb-]+\$ ]]"
}

# How many checkpoints the protection from host a has taken.
checkpoints() {
	host a 'xl-colo status --json' | sed -E 's/.*"checkpoints":\{[^}]*\},?[^}]*"total":([0-9]+).*/\1/'
}

# put HOST KEY VALUE, get HOST KEY: from the dom0 of HOST, over the LAN.
put() {
	host "$1" "curl -sS --fail --max-time 30 -o /dev/null -w '%{http_code}' -X PUT --data-binary '$3' $GUEST_URL/k/$2"
}

get() {
	host "$1" "curl -sS --fail --max-time 30 $GUEST_URL/k/$2"
}

# start_writer HOST: writes keys of the guest from there, one after another over one connection, until check_writer. Each
# answer stands in a line of /run/acked.
start_writer() {
	host "$1" "rm -f /run/acked /run/writer.*; echo -n 'what was written' >/run/writer.value; touch /run/acked
		setsid curl -sS --no-buffer --rate 8/s --max-time 900 -w '%{stderr}%{http_code} %{num_connects}\n' -o /dev/null \
			-T /run/writer.value '$GUEST_URL/k/w[1-7000]' </dev/null >/dev/null 2>/run/acked &
		echo \$! >/run/writer.pid"
}

# acked HOST: how many of its writes the guest has answered. has_acked HOST NUMBER: whether they are as many.
acked() {
	host "$1" 'wc -l </run/acked'
}

has_acked() {
	[[ $(acked "$1") -ge $2 ]]
}

# check_writer HOST: ends the writer. It had one connection, each write was answered well, and all are there.
check_writer() {
	local count
	# shellcheck disable=SC2016 # for dom0 to expand
	host "$1" 'kill $(</run/writer.pid); while [[ -d /proc/$(</run/writer.pid) ]]; do sleep 0.1; done'
	count=$(acked "$1")
	expect "the first write opened the one connection" '20? 1' "$(host "$1" "head -n 1 /run/acked | sed 's/^20[01]/20?/'")"
	expect "the others went over it, and all succeeded" '' "$(host "$1" "tail -n +2 /run/acked | grep -vE '^20[01] 0$'" || true)"
	expect "all $count answered writes are there" "$count" "$(RUN_SECONDS=300 host "$1" \
		"curl -sS --max-time 250 '$GUEST_URL/k/w[1-$count]' | grep -o 'what was written' | wc -l")"
}

# check_registers HOST GUEST: what guest-tool says of the processor's registers.
check_registers() {
	wait_until 90 said "$1" "$2" 'GUEST-(AVX|SSE) (ok|ERROR)' || die "$2 says nothing of its registers"
	holds "$(host "$1" "grep -aoEm1 'GUEST-(AVX|SSE)' /var/log/xen/guest-$2.log") registers keep their values" \
		host "$1" "! grep -qaE 'GUEST-(AVX|SSE) ERROR' /var/log/xen/guest-$2.log"
}
