#!/usr/bin/env bash
# Our NBD server against qemu-nbd and nbdkit: the same 256 MiB in memory, the same fio, the servers in turn within each
# cell and each round. Called by bench.sh nbd. Beside them a server without a disk (tests/bench/nbd_limit.rs), which is
# about what this client on this machine lets any server reach.
#
# target/bench/nbd.json has every cell: operations per second of each server (medians over the rounds), and ours over the
# best of the others and over the limit, the medians of the rounds' ratios. Aim: 1.5 of the best in every cell.
# XL_COLO and NBD_LIMIT are the programs. ROUNDS (3), CELL_SECONDS (1), CELLS (a regular expression: which cells).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly BINARY=${XL_COLO:?bench.sh nbd sets it} LIMIT=${NBD_LIMIT:?bench.sh nbd sets it}
readonly ROUNDS=${ROUNDS:-3} CELL_SECONDS=${CELL_SECONDS:-1} CELLS=${CELLS:-.}
readonly SIZE_MIB=256
readonly SERVERS=(xl-colo qemu-nbd nbdkit-file nbdkit-memory limit)
# rw:block:depth:connections; the depth is each connection's.
readonly SHAPES=(randread:4k:1:1 randread:4k:32:1 randread:4k:64:1 randread:4k:1:4 randread:4k:32:4 randread:4k:64:4
	randwrite:4k:1:1 randwrite:4k:32:1 randwrite:4k:64:1 randwrite:4k:1:4 randwrite:4k:32:4 randwrite:4k:64:4
	read:64k:16:1 read:64k:16:4 write:64k:16:1 write:64k:16:4
	read:1m:8:1 read:1m:8:4 write:1m:8:1 write:1m:8:4)

for tool in fio qemu-nbd nbdkit nbdinfo; do
	command -v "$tool" >/dev/null || { echo "SKIP: $tool is not installed; scripts/install-deps.sh does it" >&2; exit 77; }
done

# Memory, so that the servers are measured and not a medium.
dir=$(mktemp -d -p /dev/shm)
pids=()
cleanup() {
	[[ ${#pids[@]} -eq 0 ]] || kill "${pids[@]}" 2>/dev/null || true
	rm -rf "$dir"
}
trap cleanup EXIT
results=$dir/results

# start SERVER TRANSPORT PORT: sets uri.
start() {
	local server=$1 transport=$2 port=$3 image=$dir/$1-$2.img at
	at=$dir/$server-$transport
	[[ -e $image || $server == nbdkit-memory || $server == limit ]] || head -c "${SIZE_MIB}M" /dev/urandom >"$image"
	local unix=() tcp=()
	case $server in
	xl-colo)
		unix=(-k "$at") tcp=(-b 127.0.0.1 -p "$port")
		[[ $transport == unix ]] && tcp=() || unix=()
		"$BINARY" nbd -t -e 0 -f raw --discard unmap "${unix[@]}" "${tcp[@]}" "$image" &
		;;
	qemu-nbd)
		unix=(-k "$at") tcp=(-b 127.0.0.1 -p "$port")
		[[ $transport == unix ]] && tcp=() || unix=()
		qemu-nbd -t -e 16 -f raw --cache=writeback --aio=threads "${unix[@]}" "${tcp[@]}" "$image" &
		;;
	nbdkit-*)
		unix=(-U "$at") tcp=(-i 127.0.0.1 -p "$port")
		[[ $transport == unix ]] && tcp=() || unix=()
		if [[ $server == nbdkit-file ]]; then
			nbdkit -f "${unix[@]}" "${tcp[@]}" file "$image" &
		else
			nbdkit -f "${unix[@]}" "${tcp[@]}" memory "${SIZE_MIB}M" &
		fi
		;;
	limit)
		if [[ $transport == unix ]]; then "$LIMIT" "unix:$at" & else "$LIMIT" "127.0.0.1:$port" & fi
		;;
	esac
	pids+=($!)
	uri="nbd+unix:///?socket=$at"
	[[ $transport == unix ]] || uri="nbd://127.0.0.1:$port"
	local tries=0
	until nbdinfo --size "$uri" >/dev/null 2>&1; do
		tries=$((tries + 1))
		[[ $tries -lt 100 ]] || { echo "$server does not serve $uri" >&2; exit 1; }
		sleep 0.1
	done
}

# The operations per second of one cell.
measure() {
	local shape=$2 rw bs depth jobs
	IFS=: read -r rw bs depth jobs <<<"$shape"
	fio --name=cell --ioengine=nbd --uri="$1" --rw="$rw" --bs="$bs" --iodepth="$depth" --numjobs="$jobs" --size="${SIZE_MIB}m" \
		--time_based --runtime="$CELL_SECONDS" --group_reporting --output-format=json --thread --norandommap |
		sed -n '/^{/,$p' | python3 -c 'import json, sys; j = json.load(sys.stdin)["jobs"][0]; print(j["read"]["iops"] + j["write"]["iops"])'
}

declare -A uris
port=20809
for server in "${SERVERS[@]}"; do
	for transport in unix tcp; do
		port=$((port + 1))
		start "$server" "$transport" "$port"
		uris[$server-$transport]=$uri
	done
done
# A memory disk starts as nothing: what is read must be there.
for transport in unix tcp; do
	fio --name=fill --ioengine=nbd --uri="${uris[nbdkit-memory-$transport]}" --rw=write --bs=1m --size="${SIZE_MIB}m" --thread >/dev/null
done
for round in $(seq "$ROUNDS"); do
	for transport in unix tcp; do
		for shape in "${SHAPES[@]}"; do
			[[ "$transport $shape" =~ $CELLS ]] || continue
			for server in $(shuf -e "${SERVERS[@]}"); do
				echo "$transport $shape $server $round $(measure "${uris[$server-$transport]}" "$shape")" >>"$results"
			done
		done
	done
done

mkdir -p target/bench
python3 - "$results" target/bench/nbd.json <<'PYTHON'
import collections, json, statistics, sys
cells = collections.defaultdict(lambda: collections.defaultdict(dict))
for line in open(sys.argv[1]):
    transport, shape, server, round_, iops = line.split()
    cells[transport, shape][server][round_] = float(iops)
out = []
print(f"{'cell':26} {'ours':>9} {'qemu-nbd':>9} {'nbdkit-f':>9} {'nbdkit-m':>9} {'limit':>9}  of best  limit  possible")
for (transport, shape), servers in cells.items():
    rounds = list(servers["xl-colo"])
    peers = [name for name in servers if name not in ("xl-colo", "limit")]
    best = {r: max(servers[p][r] for p in peers) for r in rounds}
    over = lambda what, than: round(statistics.median(what[r] / than[r] for r in rounds), 2)
    ratio, of_limit = over(servers["xl-colo"], best), over(servers["xl-colo"], servers["limit"])
    possible = over(servers["limit"], best)
    iops = {name: round(statistics.median(rounds.values())) for name, rounds in servers.items()}
    out.append({"transport": transport, "shape": shape, "iops": iops, "ratio_to_best_peer": ratio, "ratio_to_limit": of_limit,
                "limit_to_best_peer": possible})
    names = ("xl-colo", "qemu-nbd", "nbdkit-file", "nbdkit-memory", "limit")
    print(f"{transport + ' ' + shape:26} " + " ".join(f"{iops[n]:9}" for n in names) +
          f"  {ratio:7.2f}  {of_limit:5.2f}  {possible:8.2f}")
good = sum(cell["ratio_to_best_peer"] >= 1.5 for cell in out)
could = sum(cell["limit_to_best_peer"] >= 1.5 for cell in out)
print(f"{good} of {len(out)} cells reach 1.5 x the best peer; a server without a disk reaches it in {could}")
json.dump({"cells": out, "aim_ratio": 1.5, "cells_that_reach_it": good, "cells_that_the_limit_reaches": could},
          open(sys.argv[2], "w"), indent=1)
PYTHON
