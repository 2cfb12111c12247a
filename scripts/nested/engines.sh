# For tests of xl with either engine under it, ours and libxl's own, on the guest "plain"; sourced, never run.
# shellcheck shell=bash source-path=SCRIPTDIR source=check.sh disable=SC2317
. "$(dirname "${BASH_SOURCE[0]}")/check.sh"

export RUN_SECONDS=200

# under ours|stock COMMAND...: in dom0, with that engine.
under() {
	local engine=${1/ours/env LIBXL_SAVE_HELPER=/usr/sbin/xl-colo}
	host a "${engine/stock/env -u LIBXL_SAVE_HELPER} $2"
}

# While it arrives, a domain's name ends in --incoming, and so does its console's log ever after.
ticks() {
	host a "cat /var/log/xen/guest-plain*.log | grep -ac GUEST-TICK || true"
}

# lives WHAT: the guest says more than it has said, and nothing bad.
lives() {
	local before
	before=$(ticks)
	more() { [[ $(ticks) -gt $((before + 2)) ]]; }
	holds "$1: the guest goes on" wait_until 60 more
	holds "$1: its registers and its clock are right" \
		host a "! grep -ahE 'GUEST-[A-Z]+ ERROR|BACKWARDS|rcu: INFO|Oops|BUG:' /var/log/xen/guest-plain*.log"
}

save_and_restore() {
	local begun=$EPOCHREALTIME middle
	under "$1" 'xl save plain /tmp/plain.img >/tmp/xl.log 2>&1' || die "save under $1: $(host a 'tail -5 /tmp/xl.log')"
	middle=$EPOCHREALTIME
	under "$2" 'xl restore /tmp/plain.img >/tmp/xl.log 2>&1' || die "restore under $2: $(host a 'tail -5 /tmp/xl.log')"
	awk -v a="$begun" -v b="$middle" -v c="$EPOCHREALTIME" -v what="$1 $2" -v bytes="$(host a 'stat -c %s /tmp/plain.img')" \
		'BEGIN { split(what, e, " "); printf "figure: save %s %.2f s, %d bytes; restore %s %.2f s\n", e[1], b - a, bytes, e[2], c - b }'
	host a 'rm -f /tmp/plain.img'
	lives "saved by $1, restored by $2"
}

# To this very host: a second domain takes over from the first.
migrate() {
	local receiver="env -u LIBXL_SAVE_HELPER xl migrate-receive" begun=$EPOCHREALTIME
	[[ $2 == stock ]] || receiver="env LIBXL_SAVE_HELPER=/usr/sbin/xl-colo xl migrate-receive"
	under "$1" "xl migrate -s '' plain '$receiver' >/tmp/xl.log 2>&1" || die "migrate: $(host a 'tail -8 /tmp/xl.log')"
	awk -v a="$begun" -v b="$EPOCHREALTIME" -v what="$1 to $2" 'BEGIN { printf "figure: live migration %s %.2f s\n", what, b - a }'
	lives "migrated from $1 to $2"
}

# start_plain CONFIG: in dom0 a, until the guest ticks.
start_plain() {
	host a "xl destroy plain 2>/dev/null; rm -f /var/log/xen/guest-plain*.log
		printf '%s\n' '$1' >/tmp/plain.cfg
		xl create -q /tmp/plain.cfg"
	holds "the guest is up" wait_until 600 said a plain 'GUEST-TICK'
	wait_until 60 said a plain 'GUEST-[A-Z]+ ok' || true
}
