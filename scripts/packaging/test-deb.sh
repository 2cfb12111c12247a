#!/usr/bin/env bash
# Builds the Debian package of the program that is built, and lets it live in a clean Debian 12: installed, a pair of hosts
# started as its unit says, upgraded under them, removed, purged. Nothing may be left behind, and no guest be lost. Then the
# same in a Debian that systemd has booted, where hosts also hang, are killed, and come back.
#
# The guest is the embedded one: there is no Xen in a chroot. PROFILE (release) says which build is packed.
# Exit code 77 and a line that begins with SKIP where the machine cannot do it. Root, mmdebstrap, cargo-deb.
set -euo pipefail

readonly PROFILE=${PROFILE:-release}
readonly TRIES_SECONDS=60

say() {
	printf 'test-deb: %s\n' "$*"
}

die() {
	say "$*" >&2
	exit 1
}

skip() {
	echo "SKIP: test-deb: $*"
	exit 77
}

# wait_for SECONDS COMMAND...
wait_for() {
	local until=$((SECONDS + $1))
	shift
	until "$@" >/dev/null 2>&1; do
		[[ $SECONDS -lt $until ]] || return 1
		sleep 0.2
	done
}

build() {
	local version=$1
	# The release profile keeps debug information for profiles; it would make the package six times as large.
	cargo deb --quiet --no-build --strip --profile "$PROFILE" --deb-version "$version" --output "$WORK/xen-colo_$version.deb" \
		>"$WORK/cargo-deb.log" 2>&1 || { cat "$WORK/cargo-deb.log" >&2; die "cargo deb failed"; }
}

# The packages that ours depends on, by their names.
dependencies() {
	dpkg-deb -f "$1" Depends | sed -E 's/\([^)]*\)//g; s/\|[^,]*//g; s/[[:space:]]//g'
}

outside() {
	local repository sources=() file
	repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
	cd "$repository"
	[[ $(id -u) -eq 0 ]] || skip "a chroot needs root"
	command -v mmdebstrap >/dev/null || skip "mmdebstrap is not installed"
	command -v cargo-deb >/dev/null || skip "cargo-deb is not installed"
	readonly WORK=$repository/target/deb
	mkdir -p "$WORK"
	exec 9>"$WORK/lock"
	flock -n 9 || die "another run has $WORK/lock"
	say "building two versions"
	build 0.1.0-1
	build 0.1.0-2
	dpkg-deb --info "$WORK/xen-colo_0.1.0-1.deb" | sed -n 's/^ \(Package\|Version\|Installed-Size\|Depends\|Recommends\):/\1:/p'

	local packages digest
	packages=$(dependencies "$WORK/xen-colo_0.1.0-1.deb"),procps,libxml2-utils,systemd,systemd-sysv,dbus
	digest=$(sha256sum <<<"$packages" | cut -c1-16)
	if [[ ! -e $WORK/debian-$digest.tar ]]; then
		say "fetching a Debian with $packages"
		rm -f "$WORK"/debian-*.tar
		for file in /etc/apt/sources.list /etc/apt/sources.list.d/debian.sources; do
			[[ ! -s $file ]] || sources+=("$file")
		done
		timeout 600 mmdebstrap --variant=minbase --mode=root --include="$packages" bookworm "$WORK/fetched.tar" \
			"${sources[@]}" >"$WORK/mmdebstrap.log" 2>&1 || skip "mmdebstrap failed, see $WORK/mmdebstrap.log"
		mv "$WORK/fetched.tar" "$WORK/debian-$digest.tar"
	fi
	unpack "$digest"
	say "in a chroot"
	# Whatever it starts ends with it, and what it mounts nobody else sees.
	# shellcheck disable=SC2016 # for the inner shell to expand
	timeout 300 unshare --mount --pid --fork --kill-child bash -c '
		mount --make-rprivate /
		mount -t proc proc "$1/proc"
		mount -t tmpfs run "$1/run"
		exec chroot "$1" /bin/bash /var/tmp/test-deb.sh inside' inner "$WORK/root" || die "not what it should be"
	unpack "$digest"
	boot
	rm -rf "$WORK/root"
	say "passed"
}

# unpack DIGEST: a fresh Debian, with the two packages and this script in it.
unpack() {
	rm -rf "$WORK/root"
	mkdir "$WORK/root"
	tar -C "$WORK/root" -xf "$WORK/debian-$1.tar"
	cp "$WORK"/xen-colo_0.1.0-*.deb "$WORK/root/var/tmp/"
	cp "${BASH_SOURCE[0]}" "$WORK/root/var/tmp/test-deb.sh"
}

# A container of our own for systemd: a cgroup, and namespaces that end with its process 1.
boot() {
	local cgroup
	cgroup=$(awk '$3 == "cgroup2" { print $2; exit }' /proc/mounts)/xen-colo-test-deb
	if [[ $cgroup == /xen-colo* ]] || ! mkdir -p "$cgroup" 2>/dev/null; then
		echo "SKIP: test-deb: under systemd: there is no cgroup2 that may be written"
		return 0
	fi
	cat >"$WORK/root/etc/systemd/system/test-deb.service" <<-'UNIT'
		[Service]
		Type=oneshot
		ExecStart=/bin/bash -c '/bin/bash /var/tmp/test-deb.sh booted >/var/tmp/said 2>&1; echo $? >/var/tmp/code'
		ExecStopPost=/bin/systemctl --no-block poweroff
	UNIT
	mkdir -p "$WORK/root/etc/systemd/system/multi-user.target.wants"
	ln -s ../test-deb.service "$WORK/root/etc/systemd/system/multi-user.target.wants/"
	say "under systemd"
	# shellcheck disable=SC2016 # for the inner shells to expand
	timeout -s KILL 300 bash -c '
		echo $$ >"$2/cgroup.procs"
		exec unshare --mount --pid --cgroup --uts --net --fork --kill-child bash -c "
			mount --make-rprivate /
			ip link set lo up
			mount --bind \"\$1\" \"\$1\"
			mount -t proc proc \"\$1/proc\"
			mount -t sysfs sysfs \"\$1/sys\"
			mount -t cgroup2 cgroup2 \"\$1/sys/fs/cgroup\"
			mount -t tmpfs run \"\$1/run\"
			mount -t tmpfs tmp \"\$1/tmp\"
			mount --bind /dev \"\$1/dev\"
			exec chroot \"\$1\" env -i container=unshare PATH=/usr/sbin:/usr/bin:/sbin:/bin /lib/systemd/systemd
		" inner "$1"' outer "$WORK/root" "$cgroup" >"$WORK/systemd.log" 2>&1 || true
	find "$cgroup" -depth -type d -exec rmdir {} + 2>/dev/null || true
	if [[ ! -e $WORK/root/var/tmp/said ]]; then
		echo "SKIP: test-deb: systemd does not boot in namespaces here: $(tail -n 1 "$WORK/systemd.log")"
		return 0
	fi
	cat "$WORK/root/var/tmp/said"
	[[ $(cat "$WORK/root/var/tmp/code" 2>/dev/null) == 0 ]] || die "not what it should be, under systemd"
}

# All there is, but for what dpkg itself keeps and what the test has of its own.
files() {
	find / -xdev \( -path /proc -o -path /var/lib/dpkg -o -path /var/log -o -path /var/tmp -o -path /var/cache -o -path /srv \
		-o -path /tmp -o -path /dev \) -prune -o -print | sort
}

left_behind() {
	comm -13 /var/tmp/before <(files)
}

# start HOST: as the unit does, without systemd.
start() {
	local command
	command=$(sed -nE 's/^ExecStart=//p' /usr/lib/systemd/system/xl-colo@.service)
	(
		# shellcheck source=/dev/null
		. "/etc/xen-colo/$1.env"
		# The unit's $HOST_OPTIONS is words.
		# shellcheck disable=SC2086
		exec setsid ${command/\$HOST_OPTIONS/$HOST_OPTIONS} </dev/null >"/var/tmp/$1.log" 2>&1
	) &
	wait_for "$TRIES_SECONDS" xl-colo status --host "$1" || die "host $1 does not start: $(cat "/var/tmp/$1.log")"
}

is_protected() {
	[[ $(xl-colo status --host a --json) == *'"protection":"protected"'* ]]
}

inside() {
	export PATH=/usr/sbin:/usr/bin:/sbin:/bin DEBIAN_FRONTEND=noninteractive
	mkdir -p /srv/a /srv/b
	files >/var/tmp/before
	dpkg -i /var/tmp/xen-colo_0.1.0-1.deb >/var/tmp/dpkg.log 2>&1 || die "install: $(cat /var/tmp/dpkg.log)"
	xl-colo --version
	local file
	for file in /usr/lib/systemd/system/xl-colo{@.service,.target,-arbiter.service} /etc/xen/scripts/{vif,block}-colo \
		/etc/xen/scripts/colo-proxy-setup /usr/lib/ocf/resource.d/xen-colo/guest /usr/share/doc/xen-colo/copyright \
		/usr/share/doc/xen-colo/examples/{web.env,pvh-remus.cfg,hvm-colo.cfg,grafana/xen-colo.json,prometheus/xen-colo.rules.yml} \
		/usr/share/man/man1/xl-colo{,-report,-host}.1.gz /usr/share/bash-completion/completions/xl-colo; do
		[[ -s $file ]] || die "$file is not installed"
	done
	/usr/lib/ocf/resource.d/xen-colo/guest meta-data 2>/dev/null | xmllint --noout - || die "the agent has no meta-data"
	# The machine has no Xen: said so, and no more.
	xl-colo check >/var/tmp/check.log 2>&1 && die "xl-colo check finds Xen in a chroot"
	grep -q '^not ' /var/tmp/check.log || die "xl-colo check: $(cat /var/tmp/check.log)"

	local each
	for each in a b; do
		echo "HOST_OPTIONS=\"--name $each --listen unix:/srv/$each/peer --disk /srv/$each/disk.img --arbiter file:/srv/register.json\"" \
			>/etc/xen-colo/$each.env
	done
	sed -i 's/"$/ --guest web --guest-mib 4 --disk-mib 4"/' /etc/xen-colo/a.env
	start b
	start a
	timeout 60 xl-colo protect unix:/srv/b/peer --host a --mode remus --wait || die "the guest is not protected"
	say "installed, and a guest is protected"

	local pids
	pids=$(pgrep -x xl-colo | sort)
	dpkg -i /var/tmp/xen-colo_0.1.0-2.deb >/var/tmp/dpkg.log 2>&1 || die "upgrade: $(cat /var/tmp/dpkg.log)"
	grep -q 'go on with the program of version 0.1.0-1' /var/tmp/dpkg.log || die "upgrade: $(cat /var/tmp/dpkg.log)"
	[[ $(dpkg-query -W -f '${Version}' xen-colo) == 0.1.0-2 ]] || die "not upgraded"
	[[ $(pgrep -x xl-colo | sort) == "$pids" ]] || die "the upgrade touched the hosts that run"
	is_protected || die "the upgrade cost the protection"
	say "upgraded, and the guest is protected still"

	# A Xen guest would run on: a stand-in for xl says that this one is one.
	# shellcheck disable=SC2016 # for that script to expand
	printf '#!/bin/sh\ntest "$1 $2" = "list web"\n' >/usr/local/bin/xl
	chmod 755 /usr/local/bin/xl
	PATH=/usr/local/bin:$PATH dpkg -r xen-colo >/var/tmp/dpkg.log 2>&1 && die "removed under a running Xen guest"
	grep -q 'Shut the guest down (xl shutdown web)' /var/tmp/dpkg.log || die "remove: $(cat /var/tmp/dpkg.log)"
	rm /usr/local/bin/xl
	[[ $(pgrep -x xl-colo | sort) == "$pids" ]] || die "the refused removal ended a host"
	[[ $(xl-colo status --host a --json) == *'"protection":"unprotected"'* ]] || die "and did not end the protection"
	say "not removed under a guest that runs on"

	timeout 60 xl-colo protect unix:/srv/b/peer --host a --mode remus --wait || die "the guest is not protected again"
	dpkg -r xen-colo >/var/tmp/dpkg.log 2>&1 || die "remove: $(cat /var/tmp/dpkg.log)"
	[[ -z $(pgrep -x xl-colo) ]] || die "hosts run on after the removal"
	grep -q 'SIGTERM: web is protected no longer' /var/tmp/a.log || die "host a said: $(cat /var/tmp/a.log)"
	[[ $(tr -d ' \n' </srv/register.json) == *'"generation":2,"holder":"a"'* ]] || die "somebody took over: $(cat /srv/register.json)"
	for each in $(left_behind); do
		[[ $each == /etc/xen* ]] || die "$each is left behind"
	done
	say "removed: $(left_behind | wc -l) files and folders of configuration are left"
	dpkg -P xen-colo >/var/tmp/dpkg.log 2>&1 || die "purge: $(cat /var/tmp/dpkg.log)"
	[[ -z $(left_behind) ]] || die "left after the purge: $(left_behind)"
	say "purged: nothing is left"
}

# show PROPERTY HOST
show() {
	systemctl show -p "$1" --value "xl-colo@$2"
}

# is HOST TEXT: what the host has told systemd of itself.
is() {
	[[ $(show StatusText "$1") == *"$2"* ]]
}

becomes() {
	wait_for "$TRIES_SECONDS" is "$1" "$2" || die "host $1 does not become \"$2\", but $(show ActiveState "$1"): $(show StatusText "$1")"
}

booted() {
	export DEBIAN_FRONTEND=noninteractive
	local each pids
	dpkg -i /var/tmp/xen-colo_0.1.0-1.deb >/var/tmp/dpkg.log 2>&1 || die "install: $(cat /var/tmp/dpkg.log)"
	mkdir -p /srv/a /srv/b /run/systemd/system/xl-colo@.service.d
	# The package's 30 s are for real guests.
	printf '[Service]\nWatchdogSec=2s\n' >/run/systemd/system/xl-colo@.service.d/test.conf
	for each in a b; do
		echo "HOST_OPTIONS=\"--name $each --listen unix:/srv/$each/peer --disk /srv/$each/disk.img --arbiter 127.0.0.1:9739\"" \
			>/etc/xen-colo/$each.env
	done
	sed -i 's/"$/ --guest web --guest-mib 4 --disk-mib 4"/' /etc/xen-colo/a.env
	systemctl daemon-reload
	# All at once, as when machines boot: a host that finds no arbiter yet is started again.
	systemctl start xl-colo-arbiter xl-colo@a xl-colo@b || true
	systemctl enable --quiet xl-colo@a xl-colo@b
	becomes a "web: UNPROTECTED"
	timeout 60 xl-colo protect unix:/srv/b/peer --host a --mode remus --wait || die "the guest is not protected"
	becomes a "web: protected; primary, peer b, generation 1"
	becomes b "web: standing by; secondary, peer a, generation 1"
	systemctl reload xl-colo@a || die "not reloaded"
	is a "web: protected" || die "the reload cost the protection"
	say "started, protected, reloaded"

	kill -STOP "$(show MainPID b)"
	becomes a "web: taken over"
	wait_for "$TRIES_SECONDS" is_restarted b || die "the watchdog did not bite"
	becomes b "no guest"
	say "a secondary that hung was ended and started again"

	timeout 60 xl-colo protect unix:/srv/b/peer --host a --mode colo --wait || die "the guest is not protected again"
	kill -KILL "$(show MainPID a)"
	becomes b "web: taken over"
	becomes a "host b holds generation 4; web is not this host's"
	say "a primary that was killed came back without the guest, which had gone on"
	xl-colo report /var/log/xen-colo -o /srv/report.html >/var/tmp/report.log 2>&1 || die "report: $(cat /var/tmp/report.log)"
	grep -q 'report.html: web, .* host b went on in generation 4' /var/tmp/report.log || die "report: $(cat /var/tmp/report.log)"
	say "what happened is in a page"

	pids=$(pgrep -x xl-colo | sort)
	dpkg -i /var/tmp/xen-colo_0.1.0-2.deb >/var/tmp/dpkg.log 2>&1 || die "upgrade: $(cat /var/tmp/dpkg.log)"
	[[ $(pgrep -x xl-colo | sort) == "$pids" ]] || die "the upgrade touched the hosts that run"
	dpkg -P xen-colo >/var/tmp/dpkg.log 2>&1 || die "purge: $(cat /var/tmp/dpkg.log)"
	[[ -z $(pgrep -x xl-colo) ]] || die "hosts run on after the removal"
	for each in a b; do
		[[ $(show Result $each) == success ]] || die "host $each ended as $(show Result $each)"
	done
	for each in /etc /var/lib /var/log /run; do
		[[ ! -e $each/xen-colo ]] || die "left: $each/xen-colo"
	done
	say "upgraded under them and purged"
}

is_restarted() {
	[[ $(show NRestarts "$1") -gt 0 ]]
}

case ${1:-} in
inside) inside ;;
booted) booted ;;
*) outside ;;
esac
