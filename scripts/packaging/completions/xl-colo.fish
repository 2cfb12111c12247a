# Print an optspec for argparse to handle cmd's options that are independent of any subcommand.
function __fish_xl_colo_global_optspecs
    string join \n json h/help V/version
end

function __fish_xl_colo_needs_command
    # Figure out if the current invocation already has a command.
    set -l cmd (commandline -opc)
    set -e cmd[1]
    argparse -s (__fish_xl_colo_global_optspecs) -- $cmd 2>/dev/null
    or return
    if set -q argv[1]
        # Also print the command, so this can be used to figure out what it is.
        echo $argv[1]
        return 1
    end
    return 0
end

function __fish_xl_colo_using_subcommand
    set -l cmd (__fish_xl_colo_needs_command)
    test -z "$cmd"
    and return 1
    contains -- $cmd[1] $argv
end

complete -c xl-colo -n "__fish_xl_colo_needs_command" -l json -d 'Say what there is to say in JSON, an object a line; why a command failed too, on standard error: {"error":{"class":…,"text":…,"do":…}}'
complete -c xl-colo -n "__fish_xl_colo_needs_command" -s h -l help -d 'Print help'
complete -c xl-colo -n "__fish_xl_colo_needs_command" -s V -l version -d 'Print version'
complete -c xl-colo -n "__fish_xl_colo_needs_command" -f -a "demo" -d 'Protect a guest, kill its host, and report what a client saw'
complete -c xl-colo -n "__fish_xl_colo_needs_command" -f -a "host" -d 'Run a host: with --guest it boots one, without it stands by for another host\'s'
complete -c xl-colo -n "__fish_xl_colo_needs_command" -f -a "protect" -d 'Replicate the guest of a host to a peer'
complete -c xl-colo -n "__fish_xl_colo_needs_command" -f -a "unprotect" -d 'End a protection without a failover: the guest goes on here, and the peer drops what it has of it'
complete -c xl-colo -n "__fish_xl_colo_needs_command" -f -a "remus" -d 'Protect a domain until that is over, with the letters of `xl remus`'
complete -c xl-colo -n "__fish_xl_colo_needs_command" -f -a "receive" -d 'Join standard input and output to the host that runs here: the far end of `remus` over ssh'
complete -c xl-colo -n "__fish_xl_colo_needs_command" -f -a "status" -d 'Say how a host and its guest are'
complete -c xl-colo -n "__fish_xl_colo_needs_command" -f -a "list" -d 'Say which hosts run on this machine, and how their guests are'
complete -c xl-colo -n "__fish_xl_colo_needs_command" -f -a "events" -d 'Say what happened to a host and its guest'
complete -c xl-colo -n "__fish_xl_colo_needs_command" -f -a "report" -d 'Write a page of what happened to a guest, from the event logs of its hosts'
complete -c xl-colo -n "__fish_xl_colo_needs_command" -f -a "top" -d 'Show how a host and its guest are on a live screen'
complete -c xl-colo -n "__fish_xl_colo_needs_command" -f -a "config" -d 'Write a guest\'s configuration with every default and a comment for each; or check one'
complete -c xl-colo -n "__fish_xl_colo_needs_command" -f -a "check" -d 'Say whether this host is able to protect guests, and what it lacks; whether a peer answers, and what is in the way of protecting a guest'
complete -c xl-colo -n "__fish_xl_colo_needs_command" -f -a "set" -d 'Change what can change while a host runs: checkpoint-delay-ms, heartbeat-ms, heartbeat-misses, log'
complete -c xl-colo -n "__fish_xl_colo_needs_command" -f -a "checkpoint" -d 'Take a checkpoint now'
complete -c xl-colo -n "__fish_xl_colo_needs_command" -f -a "failover" -d 'Go on alone on this host, or decide for a guest that is held here'
complete -c xl-colo -n "__fish_xl_colo_needs_command" -f -a "stop" -d 'End a host, and wait for it; its guest goes on at the peer if it is protected, and ends if it is not'
complete -c xl-colo -n "__fish_xl_colo_needs_command" -f -a "arbiter" -d 'Serve an arbiter\'s register to two hosts, on a third machine'
complete -c xl-colo -n "__fish_xl_colo_needs_command" -f -a "nbd" -d 'Serve a disk image over NBD, with qemu-nbd\'s options'
complete -c xl-colo -n "__fish_xl_colo_needs_command" -f -a "qmp" -d 'Give an order to a QMP monitor, ours or a QEMU\'s; or be one, for a replica whose primary is a QEMU'
complete -c xl-colo -n "__fish_xl_colo_needs_command" -f -a "qemu" -d 'Make two QEMUs that run a COLO pair, and end it, by their own commands'
complete -c xl-colo -n "__fish_xl_colo_needs_command" -f -a "compare" -d 'Compare the packets of two guests behind QEMU\'s chardev sockets, in the place of its colo-compare object'
complete -c xl-colo -n "__fish_xl_colo_needs_command" -f -a "filter" -d 'Stand in for QEMU\'s network filters on an interface of this host, towards a comparator'
complete -c xl-colo -n "__fish_xl_colo_needs_command" -f -a "save-helper" -d 'Save or restore a domain for libxl; set LIBXL_SAVE_HELPER to this program and use xl as ever'
complete -c xl-colo -n "__fish_xl_colo_needs_command" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand demo" -l mode -d 'colo: both guests run; remus: output waits for checkpoints' -r
complete -c xl-colo -n "__fish_xl_colo_using_subcommand demo" -l kill -d 'Which host dies' -r -f -a "primary\t'The host that runs the guest'
secondary\t'The host that stands by'"
complete -c xl-colo -n "__fish_xl_colo_using_subcommand demo" -l guest-mib -d 'The guest\'s memory in MiB' -r
complete -c xl-colo -n "__fish_xl_colo_using_subcommand demo" -l seconds -d 'How long the client works before and after the kill together' -r
complete -c xl-colo -n "__fish_xl_colo_using_subcommand demo" -l diverge -d 'How often, in percent, the guest\'s responses differ between its two copies' -r
complete -c xl-colo -n "__fish_xl_colo_using_subcommand demo" -l serve -d 'Keep the pair running and serve the guest at this address, for your own curl and your own kill' -r
complete -c xl-colo -n "__fish_xl_colo_using_subcommand demo" -l report -d 'Keep the event logs of both hosts in this directory, which must have none yet, and write the page of the run: DIR/report.html' -r -F
complete -c xl-colo -n "__fish_xl_colo_using_subcommand demo" -l nested -d 'Use real Xen hosts that this program (scripts/nested/nested) boots and kills' -r -F
complete -c xl-colo -n "__fish_xl_colo_using_subcommand demo" -l guest -d 'The Xen guest' -r -f -a "pvh\t'With PV drivers and no device model'
hvm\t'Without PV drivers'
pvhvm\t'With PV drivers and a device model'"
complete -c xl-colo -n "__fish_xl_colo_using_subcommand demo" -l json -d 'Say what there is to say in JSON, an object a line; why a command failed too, on standard error: {"error":{"class":…,"text":…,"do":…}}'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand demo" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand host" -l name -d 'The host\'s name; the two of a pair must differ. With --config the machine\'s by default' -r
complete -c xl-colo -n "__fish_xl_colo_using_subcommand host" -l config -d 'The guest\'s configuration: what it says holds where this command line says nothing (xl-colo config)' -r -F
complete -c xl-colo -n "__fish_xl_colo_using_subcommand host" -l listen -d 'Where the peer connects: HOST:PORT or unix:PATH' -r
complete -c xl-colo -n "__fish_xl_colo_using_subcommand host" -l run-dir -d 'The directory of the control sockets' -r -F
complete -c xl-colo -n "__fish_xl_colo_using_subcommand host" -l disk -d 'A disk image: of the guest booted here, or of the replica; again for each further disk of the guest' -r -F
complete -c xl-colo -n "__fish_xl_colo_using_subcommand host" -l export -d 'What both hosts call a disk (xl\'s colo-export), again for each disk in their order: a primary whose disks are called otherwise, or are in another order, is refused. Without names disks are matched by their order alone' -r
complete -c xl-colo -n "__fish_xl_colo_using_subcommand host" -l spill-dir -d 'Where disk epochs go that do not fit into memory; beside the first image by default' -r -F
complete -c xl-colo -n "__fish_xl_colo_using_subcommand host" -l epoch-memory-mib -d 'Memory in MiB that the replicas\' disk epochs may use together before they go to the spill directory' -r
complete -c xl-colo -n "__fish_xl_colo_using_subcommand host" -l net -d 'The switch port of the guest\'s NIC' -r
complete -c xl-colo -n "__fish_xl_colo_using_subcommand host" -l metrics-listen -d 'Tell Prometheus how the host and its guest are, at /metrics: a port of the loopback address, or the address of another interface written out; anybody who reaches it can read there. Port 0 is any. Off by default' -r
complete -c xl-colo -n "__fish_xl_colo_using_subcommand host" -l arbiter -d 'Who decides which host goes on alone: file:PATH, or the address of `xl-colo arbiter`' -r
complete -c xl-colo -n "__fish_xl_colo_using_subcommand host" -l policy -d 'What must be won before going on alone: arbiter, hold, script:PATH, or alone (unsafe, for tests)' -r
complete -c xl-colo -n "__fish_xl_colo_using_subcommand host" -l guest -d 'Run a guest of this name: an embedded one, or with --xen a domain' -r
complete -c xl-colo -n "__fish_xl_colo_using_subcommand host" -l xen -d 'The guest is a Xen domain: adopt it if it runs, make it from this xl configuration if not' -r -F
complete -c xl-colo -n "__fish_xl_colo_using_subcommand host" -l guest-mib -d 'The guest\'s memory in MiB' -r
complete -c xl-colo -n "__fish_xl_colo_using_subcommand host" -l disk-mib -d 'The size of a new disk image in MiB' -r
complete -c xl-colo -n "__fish_xl_colo_using_subcommand host" -l diverge -d 'How often, in percent, the guest\'s responses differ between its two copies' -r
complete -c xl-colo -n "__fish_xl_colo_using_subcommand host" -l event-log -d 'Where to write down what happens, a line of JSON each, in two files of 16 MiB at most; by default NAME.events beside the control socket, or in the directory that systemd gives to a unit with LogsDirectory=' -r -F
complete -c xl-colo -n "__fish_xl_colo_using_subcommand host" -l seed -d 'Seeds the guest\'s hardware randomness on this host; drawn when absent' -r
complete -c xl-colo -n "__fish_xl_colo_using_subcommand host" -l follow-stdin -d 'End when standard input closes'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand host" -l json -d 'Say what there is to say in JSON, an object a line; why a command failed too, on standard error: {"error":{"class":…,"text":…,"do":…}}'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand host" -s h -l help -d 'Print help'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand protect" -l config -d 'The guest\'s configuration: what it says holds where this command line says nothing; /etc/xen-colo/NAME.toml by default, if it is there' -r -F
complete -c xl-colo -n "__fish_xl_colo_using_subcommand protect" -l host -d 'The host whose guest is protected: its name, or the name or number of its guest; may be left out when only one runs here' -r
complete -c xl-colo -n "__fish_xl_colo_using_subcommand protect" -l run-dir -d 'The directory of the control sockets' -r -F
complete -c xl-colo -n "__fish_xl_colo_using_subcommand protect" -l mode -d 'colo: both guests run; remus: output waits for checkpoints' -r
complete -c xl-colo -n "__fish_xl_colo_using_subcommand protect" -l resume -d 'When the guest runs on after a capture' -r -f -a "after-capture\t'At once; the wire is not in the pause'
after-loaded\t'When the peer has loaded the state: the classic order'"
complete -c xl-colo -n "__fish_xl_colo_using_subcommand protect" -l checkpoint-delay-ms -d 'Longest time between two checkpoints; 5000 for colo, 200 for remus' -r
complete -c xl-colo -n "__fish_xl_colo_using_subcommand protect" -l heartbeat-ms -d 'Time between two heartbeats' -r
complete -c xl-colo -n "__fish_xl_colo_using_subcommand protect" -l heartbeat-misses -d 'Missed heartbeats after which the peer is lost' -r
complete -c xl-colo -n "__fish_xl_colo_using_subcommand protect" -l delta-mib -d 'Memory in MiB that remembers sent pages, so that only what changed in them is sent again; 0: pages go whole' -r
complete -c xl-colo -n "__fish_xl_colo_using_subcommand protect" -l min-run-percent -d 'The share of its time that a guest in lock-step must run; while differences leave it less, output is buffered as in remus mode; 0 for never, 50 by default' -r
complete -c xl-colo -n "__fish_xl_colo_using_subcommand protect" -l packet-digests -d 'Let the secondary send digests instead of payloads, which saves most of what its guest\'s packets cost the link'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand protect" -l wait -d 'Return when the guest is protected, not when the copy has begun'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand protect" -l json -d 'Say what there is to say in JSON, an object a line; why a command failed too, on standard error: {"error":{"class":…,"text":…,"do":…}}'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand protect" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand unprotect" -l host -d 'The same' -r
complete -c xl-colo -n "__fish_xl_colo_using_subcommand unprotect" -l run-dir -d 'The directory of the control sockets' -r -F
complete -c xl-colo -n "__fish_xl_colo_using_subcommand unprotect" -l json -d 'Say what there is to say in JSON, an object a line; why a command failed too, on standard error: {"error":{"class":…,"text":…,"do":…}}'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand unprotect" -s h -l help -d 'Print help'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand remus" -s i -d 'Time between two checkpoints; 200 by default' -r
complete -c xl-colo -n "__fish_xl_colo_using_subcommand remus" -s s -d 'Use this instead of ssh; if it is empty, HOST is a command whose standard input and output lead to the peer' -r
complete -c xl-colo -n "__fish_xl_colo_using_subcommand remus" -s N -d 'Taken for the sake of scripts: packets are held here, and no script is needed' -r -F
complete -c xl-colo -n "__fish_xl_colo_using_subcommand remus" -l run-dir -d 'The directory of the control sockets' -r -F
complete -c xl-colo -n "__fish_xl_colo_using_subcommand remus" -s u -d 'Send pages as they are'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand remus" -s e -d 'Tell the receiver to stay in the foreground'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand remus" -s F -d 'Allow -b, -n and -d'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand remus" -s b -d 'Protect for nobody: the peer keeps nothing'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand remus" -s n -d 'Let packets leave before the peer owns what they tell'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand remus" -s d -d 'Do not replicate disks'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand remus" -s c -l colo -d 'Lock-step: both guests run, and a packet leaves when both said it'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand remus" -s p -d 'Compare packets in user space, as is done here always'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand remus" -l json -d 'Say what there is to say in JSON, an object a line; why a command failed too, on standard error: {"error":{"class":…,"text":…,"do":…}}'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand remus" -s h -l help -d 'Print help'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand receive" -l host -d 'The same' -r
complete -c xl-colo -n "__fish_xl_colo_using_subcommand receive" -l run-dir -d 'The directory of the control sockets' -r -F
complete -c xl-colo -n "__fish_xl_colo_using_subcommand receive" -l blackhole -d 'Be a peer that keeps nothing'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand receive" -s F -d 'xl\'s: stay in the foreground (it always does)'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand receive" -s r -d 'xl\'s: for Remus (the primary says so itself)'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand receive" -l colo -d 'xl\'s: for COLO (the primary says so itself)'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand receive" -l json -d 'Say what there is to say in JSON, an object a line; why a command failed too, on standard error: {"error":{"class":…,"text":…,"do":…}}'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand receive" -s h -l help -d 'Print help'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand status" -l host -d 'The same' -r
complete -c xl-colo -n "__fish_xl_colo_using_subcommand status" -l run-dir -d 'The directory of the control sockets' -r -F
complete -c xl-colo -n "__fish_xl_colo_using_subcommand status" -l watch -d 'Print again every second until interrupted'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand status" -l json -d 'Say what there is to say in JSON, an object a line; why a command failed too, on standard error: {"error":{"class":…,"text":…,"do":…}}'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand status" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand list" -l run-dir -d 'The directory of the control sockets' -r -F
complete -c xl-colo -n "__fish_xl_colo_using_subcommand list" -l json -d 'Say what there is to say in JSON, an object a line; why a command failed too, on standard error: {"error":{"class":…,"text":…,"do":…}}'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand list" -s h -l help -d 'Print help'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand events" -l host -d 'The same' -r
complete -c xl-colo -n "__fish_xl_colo_using_subcommand events" -l run-dir -d 'The directory of the control sockets' -r -F
complete -c xl-colo -n "__fish_xl_colo_using_subcommand events" -l since -d 'Only events with larger numbers than this' -r
complete -c xl-colo -n "__fish_xl_colo_using_subcommand events" -s f -l follow -d 'Go on with what happens from now on, until the host ends'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand events" -l json -d 'Say what there is to say in JSON, an object a line; why a command failed too, on standard error: {"error":{"class":…,"text":…,"do":…}}'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand events" -s h -l help -d 'Print help'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand report" -s o -l output -d 'Where the page goes; DIR/report.html by default' -r -F
complete -c xl-colo -n "__fish_xl_colo_using_subcommand report" -l guest -d 'The guest, where the logs are of several' -r
complete -c xl-colo -n "__fish_xl_colo_using_subcommand report" -l json -d 'Say what there is to say in JSON, an object a line; why a command failed too, on standard error: {"error":{"class":…,"text":…,"do":…}}'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand report" -s h -l help -d 'Print help'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand top" -l host -d 'The same' -r
complete -c xl-colo -n "__fish_xl_colo_using_subcommand top" -l run-dir -d 'The directory of the control sockets' -r -F
complete -c xl-colo -n "__fish_xl_colo_using_subcommand top" -l json -d 'Say what there is to say in JSON, an object a line; why a command failed too, on standard error: {"error":{"class":…,"text":…,"do":…}}'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand top" -s h -l help -d 'Print help'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand config" -l check -d 'Say what is wrong with this configuration, and with the xl configuration that it names' -r -F
complete -c xl-colo -n "__fish_xl_colo_using_subcommand config" -l xl -d 'Take the peer and the spill directory from the COLO keys of a domain\'s xl configuration' -r -F
complete -c xl-colo -n "__fish_xl_colo_using_subcommand config" -l json -d 'Say what there is to say in JSON, an object a line; why a command failed too, on standard error: {"error":{"class":…,"text":…,"do":…}}'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand config" -s h -l help -d 'Print help'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand check" -l guest -d 'A Xen domain of this host to be protected, by its name or number' -r
complete -c xl-colo -n "__fish_xl_colo_using_subcommand check" -l json -d 'Say what there is to say in JSON, an object a line; why a command failed too, on standard error: {"error":{"class":…,"text":…,"do":…}}'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand check" -s h -l help -d 'Print help'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand set" -l host -d 'The host: its name, or the name or number of its guest; may be left out when only one runs here' -r
complete -c xl-colo -n "__fish_xl_colo_using_subcommand set" -l run-dir -d 'The directory of the control sockets' -r -F
complete -c xl-colo -n "__fish_xl_colo_using_subcommand set" -l json -d 'Say what there is to say in JSON, an object a line; why a command failed too, on standard error: {"error":{"class":…,"text":…,"do":…}}'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand set" -s h -l help -d 'Print help'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand checkpoint" -l host -d 'The same' -r
complete -c xl-colo -n "__fish_xl_colo_using_subcommand checkpoint" -l run-dir -d 'The directory of the control sockets' -r -F
complete -c xl-colo -n "__fish_xl_colo_using_subcommand checkpoint" -l json -d 'Say what there is to say in JSON, an object a line; why a command failed too, on standard error: {"error":{"class":…,"text":…,"do":…}}'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand checkpoint" -s h -l help -d 'Print help'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand failover" -l host -d 'The same' -r
complete -c xl-colo -n "__fish_xl_colo_using_subcommand failover" -l run-dir -d 'The directory of the control sockets' -r -F
complete -c xl-colo -n "__fish_xl_colo_using_subcommand failover" -l wait -d 'Return when it is decided who goes on, and what the guest wrote is in its disk image'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand failover" -l json -d 'Say what there is to say in JSON, an object a line; why a command failed too, on standard error: {"error":{"class":…,"text":…,"do":…}}'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand failover" -s h -l help -d 'Print help'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand stop" -l host -d 'The same' -r
complete -c xl-colo -n "__fish_xl_colo_using_subcommand stop" -l run-dir -d 'The directory of the control sockets' -r -F
complete -c xl-colo -n "__fish_xl_colo_using_subcommand stop" -l json -d 'Say what there is to say in JSON, an object a line; why a command failed too, on standard error: {"error":{"class":…,"text":…,"do":…}}'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand stop" -s h -l help -d 'Print help'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand arbiter" -l listen -d 'Where hosts connect: HOST:PORT or unix:PATH' -r
complete -c xl-colo -n "__fish_xl_colo_using_subcommand arbiter" -l file -d 'The register' -r -F
complete -c xl-colo -n "__fish_xl_colo_using_subcommand arbiter" -l json -d 'Say what there is to say in JSON, an object a line; why a command failed too, on standard error: {"error":{"class":…,"text":…,"do":…}}'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand arbiter" -s h -l help -d 'Print help'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand nbd" -s c -l connect -d 'Make this device of the kernel the disk, and go to the background unless -v is there' -r
complete -c xl-colo -n "__fish_xl_colo_using_subcommand nbd" -s d -l disconnect -d 'Let go of this device of the kernel, instead of serving' -r
complete -c xl-colo -n "__fish_xl_colo_using_subcommand nbd" -s k -l socket -d 'Serve on a Unix socket, whatever -p and -b say' -r -F
complete -c xl-colo -n "__fish_xl_colo_using_subcommand nbd" -s p -l port -d 'Serve on this TCP port; 10809, which has the name nbd, by default' -r
complete -c xl-colo -n "__fish_xl_colo_using_subcommand nbd" -s b -l bind -d 'Serve on this address; on all by default' -r
complete -c xl-colo -n "__fish_xl_colo_using_subcommand nbd" -s f -l format -d 'The image\'s format; raw is the only one. Without it an image that begins as one of another format is refused, and made to begin so by no client' -r -f -a "raw\t''"
complete -c xl-colo -n "__fish_xl_colo_using_subcommand nbd" -s x -l export-name -d 'The export\'s name' -r
complete -c xl-colo -n "__fish_xl_colo_using_subcommand nbd" -s D -l description -d 'The export\'s description' -r
complete -c xl-colo -n "__fish_xl_colo_using_subcommand nbd" -s o -l offset -d 'Serve from this byte of the image on' -r
complete -c xl-colo -n "__fish_xl_colo_using_subcommand nbd" -l locking -d 'Whether the image is locked in QEMU\'s way too; off is for one that a device model has open as well' -r -f -a "on\t''
off\t''"
complete -c xl-colo -n "__fish_xl_colo_using_subcommand nbd" -s e -l shared -d 'Clients at the same time, and one more waits; 0 for any number' -r
complete -c xl-colo -n "__fish_xl_colo_using_subcommand nbd" -l cache -d 'What a completed write means: writeback, or writethrough and directsync (durable), or unsafe (flushes do nothing)' -r -f -a "none\t''
off\t''
writeback\t''
writethrough\t''
directsync\t''
unsafe\t''"
complete -c xl-colo -n "__fish_xl_colo_using_subcommand nbd" -l discard -d 'Whether discarding frees space' -r -f -a "ignore\t''
off\t''
unmap\t''
on\t''"
complete -c xl-colo -n "__fish_xl_colo_using_subcommand nbd" -l detect-zeroes -d 'Whether writes of zeroes are looked for, and free their space' -r -f -a "off\t''
on\t''
unmap\t''"
complete -c xl-colo -n "__fish_xl_colo_using_subcommand nbd" -l aio -d 'Taken for the sake of scripts: threads read and write, whatever is asked for' -r -f -a "threads\t''
native\t''
io_uring\t''"
complete -c xl-colo -n "__fish_xl_colo_using_subcommand nbd" -l object -d 'Certificates: tls-creds-x509,id=ID,endpoint=server,dir=DIR[,verify-peer=on|off]' -r
complete -c xl-colo -n "__fish_xl_colo_using_subcommand nbd" -l tls-creds -d 'Serve nobody in the clear; the --object of this id has the certificates' -r
complete -c xl-colo -n "__fish_xl_colo_using_subcommand nbd" -l pid-file -d 'Write the process\'s number to this file, which stays, and is locked meanwhile' -r -F
complete -c xl-colo -n "__fish_xl_colo_using_subcommand nbd" -s L -l list -d 'Tell what the server offers that listens there, instead of serving'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand nbd" -s r -l read-only -d 'Take no writes'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand nbd" -s A -l allocation-depth -d 'Offer qemu:allocation-depth, which is 1 everywhere: there is one image'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand nbd" -l salvage -d 'Serve a replica\'s image that is not whole, to save what is in it'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand nbd" -s t -l persistent -d 'Go on when the last client has left'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand nbd" -s n -l nocache -d 'The same as --cache=none, which here is --cache=writeback'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand nbd" -l fork -d 'Go to the background once clients can connect'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand nbd" -s v -l verbose -d 'Taken for the sake of scripts; XEN_COLO_LOG=debug logs each client on standard error'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand nbd" -l json -d 'Say what there is to say in JSON, an object a line; why a command failed too, on standard error: {"error":{"class":…,"text":…,"do":…}}'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand nbd" -s h -l help -d 'Print help'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand qmp" -l connect -d 'Give an order to the monitor at this socket' -r -F
complete -c xl-colo -n "__fish_xl_colo_using_subcommand qmp" -l socket -d 'Be a monitor at this socket' -r -F
complete -c xl-colo -n "__fish_xl_colo_using_subcommand qmp" -l drive -d 'With --socket: a drive as QEMU\'s -drive has it: a raw image, a quorum of one, or a replication node; again for each' -r
complete -c xl-colo -n "__fish_xl_colo_using_subcommand qmp" -l epoch-memory-mib -d 'With --socket: memory in MiB for the disks\' epochs together' -r
complete -c xl-colo -n "__fish_xl_colo_using_subcommand qmp" -l spill-dir -d 'With --socket: where disk epochs go that do not fit into memory' -r -F
complete -c xl-colo -n "__fish_xl_colo_using_subcommand qmp" -l timeout-s -d 'With --connect: how long the order may take' -r
complete -c xl-colo -n "__fish_xl_colo_using_subcommand qmp" -l json -d 'Say what there is to say in JSON, an object a line; why a command failed too, on standard error: {"error":{"class":…,"text":…,"do":…}}'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand qmp" -s h -l help -d 'Print help'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand qemu; and not __fish_seen_subcommand_from protect status checkpoint failover unprotect help" -l json -d 'Say what there is to say in JSON, an object a line; why a command failed too, on standard error: {"error":{"class":…,"text":…,"do":…}}'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand qemu; and not __fish_seen_subcommand_from protect status checkpoint failover unprotect help" -s h -l help -d 'Print help'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand qemu; and not __fish_seen_subcommand_from protect status checkpoint failover unprotect help" -f -a "protect" -d 'Make two QEMUs a COLO pair: disks, network and guest; when one of them refuses, both are left as they were'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand qemu; and not __fish_seen_subcommand_from protect status checkpoint failover unprotect help" -f -a "status" -d 'Say how the QEMUs are'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand qemu; and not __fish_seen_subcommand_from protect status checkpoint failover unprotect help" -f -a "checkpoint" -d 'Seal a checkpoint on both, while their guests stand still; of a pair whose guest a Xen toolstack carries'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand qemu; and not __fish_seen_subcommand_from protect status checkpoint failover unprotect help" -f -a "failover" -d 'Let the survivor go on alone. See to it first that the lost one is: QEMU has no fence'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand qemu; and not __fish_seen_subcommand_from protect status checkpoint failover unprotect help" -f -a "unprotect" -d 'End a pair: the guest goes on at the primary. A secondary that --migrate has filled is told to quit'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand qemu; and not __fish_seen_subcommand_from protect status checkpoint failover unprotect help" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand qemu; and __fish_seen_subcommand_from protect" -l primary -d 'The primary\'s monitor' -r
complete -c xl-colo -n "__fish_xl_colo_using_subcommand qemu; and __fish_seen_subcommand_from protect" -l secondary -d 'The secondary\'s monitor' -r
complete -c xl-colo -n "__fish_xl_colo_using_subcommand qemu; and __fish_seen_subcommand_from protect" -l timeout-s -d 'How long one order may take' -r
complete -c xl-colo -n "__fish_xl_colo_using_subcommand qemu; and __fish_seen_subcommand_from protect" -l disk -d 'A disk: the id of the primary\'s quorum, and of the secondary\'s image, which is the export\'s name; again for each' -r
complete -c xl-colo -n "__fish_xl_colo_using_subcommand qemu; and __fish_seen_subcommand_from protect" -l net -d 'A netdev, the same id on both, and where the primary listens for its secondary: with copies of what its guest hears, and for what the other one says; again for each' -r
complete -c xl-colo -n "__fish_xl_colo_using_subcommand qemu; and __fish_seen_subcommand_from protect" -l loop-dir -d 'Directory on the primary\'s host for the sockets by which its QEMU speaks to itself' -r
complete -c xl-colo -n "__fish_xl_colo_using_subcommand qemu; and __fish_seen_subcommand_from protect" -l nbd -d 'Where the secondary serves its disks, as the primary reaches it: tcp:HOST:PORT or unix:PATH' -r
complete -c xl-colo -n "__fish_xl_colo_using_subcommand qemu; and __fish_seen_subcommand_from protect" -l migrate -d 'Where the secondary waits for the guest (its -incoming). Without it a Xen toolstack carries the guest, and checkpoints are said to QEMU by `xl-colo qemu checkpoint`' -r
complete -c xl-colo -n "__fish_xl_colo_using_subcommand qemu; and __fish_seen_subcommand_from protect" -l checkpoint-delay-ms -d 'QEMU\'s longest time between two checkpoints (x-checkpoint-delay)' -r
complete -c xl-colo -n "__fish_xl_colo_using_subcommand qemu; and __fish_seen_subcommand_from protect" -l patience-s -d 'How long the guest\'s first way to the secondary may take' -r
complete -c xl-colo -n "__fish_xl_colo_using_subcommand qemu; and __fish_seen_subcommand_from protect" -l json -d 'Say what there is to say in JSON, an object a line; why a command failed too, on standard error: {"error":{"class":…,"text":…,"do":…}}'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand qemu; and __fish_seen_subcommand_from protect" -s h -l help -d 'Print help'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand qemu; and __fish_seen_subcommand_from status" -l primary -d 'The primary\'s monitor' -r
complete -c xl-colo -n "__fish_xl_colo_using_subcommand qemu; and __fish_seen_subcommand_from status" -l secondary -d 'The secondary\'s monitor' -r
complete -c xl-colo -n "__fish_xl_colo_using_subcommand qemu; and __fish_seen_subcommand_from status" -l timeout-s -d 'How long one order may take' -r
complete -c xl-colo -n "__fish_xl_colo_using_subcommand qemu; and __fish_seen_subcommand_from status" -l json -d 'Say what there is to say in JSON, an object a line; why a command failed too, on standard error: {"error":{"class":…,"text":…,"do":…}}'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand qemu; and __fish_seen_subcommand_from status" -s h -l help -d 'Print help'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand qemu; and __fish_seen_subcommand_from checkpoint" -l primary -d 'The primary\'s monitor' -r
complete -c xl-colo -n "__fish_xl_colo_using_subcommand qemu; and __fish_seen_subcommand_from checkpoint" -l secondary -d 'The secondary\'s monitor' -r
complete -c xl-colo -n "__fish_xl_colo_using_subcommand qemu; and __fish_seen_subcommand_from checkpoint" -l timeout-s -d 'How long one order may take' -r
complete -c xl-colo -n "__fish_xl_colo_using_subcommand qemu; and __fish_seen_subcommand_from checkpoint" -l json -d 'Say what there is to say in JSON, an object a line; why a command failed too, on standard error: {"error":{"class":…,"text":…,"do":…}}'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand qemu; and __fish_seen_subcommand_from checkpoint" -s h -l help -d 'Print help'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand qemu; and __fish_seen_subcommand_from failover" -l primary -d 'The primary\'s monitor' -r
complete -c xl-colo -n "__fish_xl_colo_using_subcommand qemu; and __fish_seen_subcommand_from failover" -l secondary -d 'The secondary\'s monitor' -r
complete -c xl-colo -n "__fish_xl_colo_using_subcommand qemu; and __fish_seen_subcommand_from failover" -l timeout-s -d 'How long one order may take' -r
complete -c xl-colo -n "__fish_xl_colo_using_subcommand qemu; and __fish_seen_subcommand_from failover" -l disk -d 'A disk: the id of the primary\'s quorum, and of the secondary\'s image, which is the export\'s name; again for each' -r
complete -c xl-colo -n "__fish_xl_colo_using_subcommand qemu; and __fish_seen_subcommand_from failover" -l net -d 'A netdev, the same id on both, and where the primary listens for its secondary: with copies of what its guest hears, and for what the other one says; again for each' -r
complete -c xl-colo -n "__fish_xl_colo_using_subcommand qemu; and __fish_seen_subcommand_from failover" -l loop-dir -d 'Directory on the primary\'s host for the sockets by which its QEMU speaks to itself' -r
complete -c xl-colo -n "__fish_xl_colo_using_subcommand qemu; and __fish_seen_subcommand_from failover" -l lost -d 'Who is lost' -r -f -a "primary\t'The primary: the secondary goes on'
secondary\t'The secondary: the primary goes on'"
complete -c xl-colo -n "__fish_xl_colo_using_subcommand qemu; and __fish_seen_subcommand_from failover" -l wait -d 'Return when what the guest wrote is merged into the secondary\'s image'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand qemu; and __fish_seen_subcommand_from failover" -l json -d 'Say what there is to say in JSON, an object a line; why a command failed too, on standard error: {"error":{"class":…,"text":…,"do":…}}'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand qemu; and __fish_seen_subcommand_from failover" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand qemu; and __fish_seen_subcommand_from unprotect" -l primary -d 'The primary\'s monitor' -r
complete -c xl-colo -n "__fish_xl_colo_using_subcommand qemu; and __fish_seen_subcommand_from unprotect" -l secondary -d 'The secondary\'s monitor' -r
complete -c xl-colo -n "__fish_xl_colo_using_subcommand qemu; and __fish_seen_subcommand_from unprotect" -l timeout-s -d 'How long one order may take' -r
complete -c xl-colo -n "__fish_xl_colo_using_subcommand qemu; and __fish_seen_subcommand_from unprotect" -l disk -d 'A disk: the id of the primary\'s quorum, and of the secondary\'s image, which is the export\'s name; again for each' -r
complete -c xl-colo -n "__fish_xl_colo_using_subcommand qemu; and __fish_seen_subcommand_from unprotect" -l net -d 'A netdev, the same id on both, and where the primary listens for its secondary: with copies of what its guest hears, and for what the other one says; again for each' -r
complete -c xl-colo -n "__fish_xl_colo_using_subcommand qemu; and __fish_seen_subcommand_from unprotect" -l loop-dir -d 'Directory on the primary\'s host for the sockets by which its QEMU speaks to itself' -r
complete -c xl-colo -n "__fish_xl_colo_using_subcommand qemu; and __fish_seen_subcommand_from unprotect" -l json -d 'Say what there is to say in JSON, an object a line; why a command failed too, on standard error: {"error":{"class":…,"text":…,"do":…}}'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand qemu; and __fish_seen_subcommand_from unprotect" -s h -l help -d 'Print help'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand qemu; and __fish_seen_subcommand_from help" -f -a "protect" -d 'Make two QEMUs a COLO pair: disks, network and guest; when one of them refuses, both are left as they were'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand qemu; and __fish_seen_subcommand_from help" -f -a "status" -d 'Say how the QEMUs are'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand qemu; and __fish_seen_subcommand_from help" -f -a "checkpoint" -d 'Seal a checkpoint on both, while their guests stand still; of a pair whose guest a Xen toolstack carries'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand qemu; and __fish_seen_subcommand_from help" -f -a "failover" -d 'Let the survivor go on alone. See to it first that the lost one is: QEMU has no fence'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand qemu; and __fish_seen_subcommand_from help" -f -a "unprotect" -d 'End a pair: the guest goes on at the primary. A secondary that --migrate has filled is told to quit'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand qemu; and __fish_seen_subcommand_from help" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand compare" -l primary-in -d 'Where the primary\'s frames come from' -r
complete -c xl-colo -n "__fish_xl_colo_using_subcommand compare" -l secondary-in -d 'Where the secondary\'s frames come from' -r
complete -c xl-colo -n "__fish_xl_colo_using_subcommand compare" -l outdev -d 'Where frames go that may leave' -r
complete -c xl-colo -n "__fish_xl_colo_using_subcommand compare" -l notify-dev -d 'Where a toolstack is asked for checkpoints, and says that one was made (libxl\'s userspace proxy)' -r
complete -c xl-colo -n "__fish_xl_colo_using_subcommand compare" -l compare-timeout -d 'How long a frame waits for its like, exactly, before a checkpoint is asked for' -r
complete -c xl-colo -n "__fish_xl_colo_using_subcommand compare" -l expired-scan-cycle -d 'Taken for the sake of scripts: nothing is scanned for, a frame is noticed when it has waited long enough' -r
complete -c xl-colo -n "__fish_xl_colo_using_subcommand compare" -l max-queue-size -d 'What a connection may hold, in packets of 4 KiB; all connections together four times that. Full asks for a checkpoint, and nothing is dropped' -r
complete -c xl-colo -n "__fish_xl_colo_using_subcommand compare" -l vnet-hdr-support -d 'Frames come with their virtio-net headers, and leave with them'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand compare" -s v -l verbose -d 'Log each peer on standard error; XEN_COLO_LOG says more exactly what'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand compare" -l json -d 'Say what there is to say in JSON, an object a line; why a command failed too, on standard error: {"error":{"class":…,"text":…,"do":…}}'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand compare" -s h -l help -d 'Print help'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand filter" -l dev -d 'The interface whose other end is the guest\'s' -r
complete -c xl-colo -n "__fish_xl_colo_using_subcommand filter" -l net -d 'The network\'s side: an interface' -r
complete -c xl-colo -n "__fish_xl_colo_using_subcommand filter" -l tap -d 'The network\'s side: a tap that is made for it; %d in its name is a number that is free' -r
complete -c xl-colo -n "__fish_xl_colo_using_subcommand filter" -l bridge -d 'Make the tap a port of this bridge' -r
complete -c xl-colo -n "__fish_xl_colo_using_subcommand filter" -l mirror -d 'Copy what enters the guest to there (filter-mirror, queue=tx, outdev)' -r
complete -c xl-colo -n "__fish_xl_colo_using_subcommand filter" -l to-guest -d 'What comes from there enters the guest (filter-redirector, queue=tx, indev)' -r
complete -c xl-colo -n "__fish_xl_colo_using_subcommand filter" -l redirect -d 'What the guest says goes there, and nowhere else (filter-redirector, queue=rx, outdev)' -r
complete -c xl-colo -n "__fish_xl_colo_using_subcommand filter" -l to-network -d 'What comes from there leaves for the network (filter-redirector, queue=rx, indev)' -r
complete -c xl-colo -n "__fish_xl_colo_using_subcommand filter" -l notify-dev -d 'Where a toolstack says COLO_CHECKPOINT, as to a colo-compare, while the guest stands still and has become what the other is: the rewriter forgets then' -r
complete -c xl-colo -n "__fish_xl_colo_using_subcommand filter" -l vnet-hdr-len -d 'How long these headers are at the other ends: 12, or as a QEMU\'s netdev there has them' -r
complete -c xl-colo -n "__fish_xl_colo_using_subcommand filter" -l rewriter -d 'Move the sequence numbers of the guest\'s TCP into the other guest\'s space (filter-rewriter)'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand filter" -l vnet-hdr-support -d 'Frames go with their virtio-net headers over all sockets, unfinished and uncut'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand filter" -l ring -d 'Take frames from the kernel by a ring: cheaper for many, and a frame alone comes a millisecond late'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand filter" -s v -l verbose -d 'Log each peer on standard error; XEN_COLO_LOG says more exactly what'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand filter" -l json -d 'Say what there is to say in JSON, an object a line; why a command failed too, on standard error: {"error":{"class":…,"text":…,"do":…}}'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand filter" -s h -l help -d 'Print help'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand save-helper" -l json -d 'Say what there is to say in JSON, an object a line; why a command failed too, on standard error: {"error":{"class":…,"text":…,"do":…}}'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand save-helper" -s h -l help -d 'Print help'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand help; and not __fish_seen_subcommand_from demo host protect unprotect remus receive status list events report top config check set checkpoint failover stop arbiter nbd qmp qemu compare filter save-helper help" -f -a "demo" -d 'Protect a guest, kill its host, and report what a client saw'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand help; and not __fish_seen_subcommand_from demo host protect unprotect remus receive status list events report top config check set checkpoint failover stop arbiter nbd qmp qemu compare filter save-helper help" -f -a "host" -d 'Run a host: with --guest it boots one, without it stands by for another host\'s'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand help; and not __fish_seen_subcommand_from demo host protect unprotect remus receive status list events report top config check set checkpoint failover stop arbiter nbd qmp qemu compare filter save-helper help" -f -a "protect" -d 'Replicate the guest of a host to a peer'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand help; and not __fish_seen_subcommand_from demo host protect unprotect remus receive status list events report top config check set checkpoint failover stop arbiter nbd qmp qemu compare filter save-helper help" -f -a "unprotect" -d 'End a protection without a failover: the guest goes on here, and the peer drops what it has of it'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand help; and not __fish_seen_subcommand_from demo host protect unprotect remus receive status list events report top config check set checkpoint failover stop arbiter nbd qmp qemu compare filter save-helper help" -f -a "remus" -d 'Protect a domain until that is over, with the letters of `xl remus`'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand help; and not __fish_seen_subcommand_from demo host protect unprotect remus receive status list events report top config check set checkpoint failover stop arbiter nbd qmp qemu compare filter save-helper help" -f -a "receive" -d 'Join standard input and output to the host that runs here: the far end of `remus` over ssh'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand help; and not __fish_seen_subcommand_from demo host protect unprotect remus receive status list events report top config check set checkpoint failover stop arbiter nbd qmp qemu compare filter save-helper help" -f -a "status" -d 'Say how a host and its guest are'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand help; and not __fish_seen_subcommand_from demo host protect unprotect remus receive status list events report top config check set checkpoint failover stop arbiter nbd qmp qemu compare filter save-helper help" -f -a "list" -d 'Say which hosts run on this machine, and how their guests are'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand help; and not __fish_seen_subcommand_from demo host protect unprotect remus receive status list events report top config check set checkpoint failover stop arbiter nbd qmp qemu compare filter save-helper help" -f -a "events" -d 'Say what happened to a host and its guest'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand help; and not __fish_seen_subcommand_from demo host protect unprotect remus receive status list events report top config check set checkpoint failover stop arbiter nbd qmp qemu compare filter save-helper help" -f -a "report" -d 'Write a page of what happened to a guest, from the event logs of its hosts'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand help; and not __fish_seen_subcommand_from demo host protect unprotect remus receive status list events report top config check set checkpoint failover stop arbiter nbd qmp qemu compare filter save-helper help" -f -a "top" -d 'Show how a host and its guest are on a live screen'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand help; and not __fish_seen_subcommand_from demo host protect unprotect remus receive status list events report top config check set checkpoint failover stop arbiter nbd qmp qemu compare filter save-helper help" -f -a "config" -d 'Write a guest\'s configuration with every default and a comment for each; or check one'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand help; and not __fish_seen_subcommand_from demo host protect unprotect remus receive status list events report top config check set checkpoint failover stop arbiter nbd qmp qemu compare filter save-helper help" -f -a "check" -d 'Say whether this host is able to protect guests, and what it lacks; whether a peer answers, and what is in the way of protecting a guest'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand help; and not __fish_seen_subcommand_from demo host protect unprotect remus receive status list events report top config check set checkpoint failover stop arbiter nbd qmp qemu compare filter save-helper help" -f -a "set" -d 'Change what can change while a host runs: checkpoint-delay-ms, heartbeat-ms, heartbeat-misses, log'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand help; and not __fish_seen_subcommand_from demo host protect unprotect remus receive status list events report top config check set checkpoint failover stop arbiter nbd qmp qemu compare filter save-helper help" -f -a "checkpoint" -d 'Take a checkpoint now'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand help; and not __fish_seen_subcommand_from demo host protect unprotect remus receive status list events report top config check set checkpoint failover stop arbiter nbd qmp qemu compare filter save-helper help" -f -a "failover" -d 'Go on alone on this host, or decide for a guest that is held here'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand help; and not __fish_seen_subcommand_from demo host protect unprotect remus receive status list events report top config check set checkpoint failover stop arbiter nbd qmp qemu compare filter save-helper help" -f -a "stop" -d 'End a host, and wait for it; its guest goes on at the peer if it is protected, and ends if it is not'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand help; and not __fish_seen_subcommand_from demo host protect unprotect remus receive status list events report top config check set checkpoint failover stop arbiter nbd qmp qemu compare filter save-helper help" -f -a "arbiter" -d 'Serve an arbiter\'s register to two hosts, on a third machine'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand help; and not __fish_seen_subcommand_from demo host protect unprotect remus receive status list events report top config check set checkpoint failover stop arbiter nbd qmp qemu compare filter save-helper help" -f -a "nbd" -d 'Serve a disk image over NBD, with qemu-nbd\'s options'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand help; and not __fish_seen_subcommand_from demo host protect unprotect remus receive status list events report top config check set checkpoint failover stop arbiter nbd qmp qemu compare filter save-helper help" -f -a "qmp" -d 'Give an order to a QMP monitor, ours or a QEMU\'s; or be one, for a replica whose primary is a QEMU'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand help; and not __fish_seen_subcommand_from demo host protect unprotect remus receive status list events report top config check set checkpoint failover stop arbiter nbd qmp qemu compare filter save-helper help" -f -a "qemu" -d 'Make two QEMUs that run a COLO pair, and end it, by their own commands'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand help; and not __fish_seen_subcommand_from demo host protect unprotect remus receive status list events report top config check set checkpoint failover stop arbiter nbd qmp qemu compare filter save-helper help" -f -a "compare" -d 'Compare the packets of two guests behind QEMU\'s chardev sockets, in the place of its colo-compare object'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand help; and not __fish_seen_subcommand_from demo host protect unprotect remus receive status list events report top config check set checkpoint failover stop arbiter nbd qmp qemu compare filter save-helper help" -f -a "filter" -d 'Stand in for QEMU\'s network filters on an interface of this host, towards a comparator'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand help; and not __fish_seen_subcommand_from demo host protect unprotect remus receive status list events report top config check set checkpoint failover stop arbiter nbd qmp qemu compare filter save-helper help" -f -a "save-helper" -d 'Save or restore a domain for libxl; set LIBXL_SAVE_HELPER to this program and use xl as ever'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand help; and not __fish_seen_subcommand_from demo host protect unprotect remus receive status list events report top config check set checkpoint failover stop arbiter nbd qmp qemu compare filter save-helper help" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand help; and __fish_seen_subcommand_from qemu" -f -a "protect" -d 'Make two QEMUs a COLO pair: disks, network and guest; when one of them refuses, both are left as they were'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand help; and __fish_seen_subcommand_from qemu" -f -a "status" -d 'Say how the QEMUs are'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand help; and __fish_seen_subcommand_from qemu" -f -a "checkpoint" -d 'Seal a checkpoint on both, while their guests stand still; of a pair whose guest a Xen toolstack carries'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand help; and __fish_seen_subcommand_from qemu" -f -a "failover" -d 'Let the survivor go on alone. See to it first that the lost one is: QEMU has no fence'
complete -c xl-colo -n "__fish_xl_colo_using_subcommand help; and __fish_seen_subcommand_from qemu" -f -a "unprotect" -d 'End a pair: the guest goes on at the primary. A secondary that --migrate has filled is told to quit'
