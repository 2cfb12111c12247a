#!/usr/bin/env bash
# Two hosts boot, reach each other and the harness; commands in them return what they did, many at once, in bounded time.
# shellcheck source-path=SCRIPTDIR source=../check.sh
. "$(dirname "${BASH_SOURCE[0]}")/../check.sh"

code_of() {
	local code=0
	"$@" >/dev/null 2>&1 || code=$?
	echo "$code"
}

nested up a b
expect "Xen's version on a" 4.17 "$(host a "xl info | sed -nE 's/^xen_version *: (4\.17).*/\1/p'")"
holds "a reaches b between the hosts" host a 'ping -q -c 2 -w 20 10.78.0.2'
holds "a packet of 60,000 bytes goes in one piece" host a 'ping -q -c 2 -w 20 -s 60000 -M do 10.78.0.2'
holds "b reaches a on the guests' LAN" host b 'ping -q -c 2 -w 20 10.77.0.101'

answer=$DIR/run/loopback.answer
socat -T 60 TCP-LISTEN:0,bind=127.0.0.1,fork SYSTEM:'echo here' 2>/dev/null &
server=$!
trap 'kill $server' EXIT
port=
find_listener() {
	local inode
	for inode in $(find "/proc/$server/fd" -type l -printf '%l\n' 2>/dev/null | sed -nE 's/socket:\[([0-9]+)\]/\1/p'); do
		port=$(awk -v inode="$inode" '$10 == inode && $4 == "0A" { sub(".*:", "", $2); print $2 }' /proc/net/tcp)
		[[ -z $port ]] || return 0
	done
	return 1
}
wait_until 10 find_listener || die "no listener on the loopback"
host a "socat -t 5 - TCP:10.0.2.2:$((16#$port)) </dev/null" >"$answer"
expect "a service on the harness's loopback answers dom0" here "$(<"$answer")"

expect "a command's exit code comes back" 7 "$(code_of host a 'exit 7')"
expect "a command that is killed says so" 137 "$(code_of host a 'kill -KILL $$')"
expect "output comes back byte for byte" "$(head -c 3000000 "$DIR/vmlinux" | sha256sum)" \
	"$(host a 'head -c 3000000 /boot/vmlinux' | sha256sum)"
expect "input goes there byte for byte" "$(sha256sum <"$DIR/vmlinuz")" "$(nested run -i a sha256sum <"$DIR/vmlinuz")"

begun=$SECONDS
expect "a command that takes too long is ended" 124 "$(RUN_SECONDS=2 code_of host a 'sleep 300')"
holds "and in bounded time" test $((SECONDS - begun)) -lt 30

pids=()
for n in {1..8}; do
	host a "sleep 1; echo $n; exit $n" >"$DIR/run/many.$n" &
	pids+=($!)
done
for n in {1..8}; do
	code=0
	wait "${pids[n - 1]}" || code=$?
	[[ $code -eq $n && $(<"$DIR/run/many.$n") == "$n" ]] || die "command $n of eight at once gave code $code"
done
echo "ok: eight commands at once each got their own answer"
