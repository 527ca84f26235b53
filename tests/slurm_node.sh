#!/usr/bin/env bash
# Bring up, or take down, a Slurm on this machine, from Debian's slurm-wlm and munge; all state in one folder.
#   tests/slurm_node.sh install     tests/slurm_node.sh up FOLDER [NODES]     tests/slurm_node.sh down FOLDER
# Of several nodes each has an address and a slurmd of its own: 127.0.0.1, 127.0.0.2 .., which is its name too.
# Needs root. Clients find it by SLURM_CONF=FOLDER/slurm.conf.
set -euo pipefail
action=$1 folder=${2:-} count=${3:-1}

install() {
    export DEBIAN_FRONTEND=noninteractive
    local packages=(apt-get install --yes --no-install-recommends slurm-wlm munge)
    "${packages[@]}" || { apt-get update && "${packages[@]}"; }
}

up() {
    mkdir -p "$folder"/{state,spool,munge}
    chmod 755 "$folder" "$folder/munge"
    dd if=/dev/urandom of="$folder/munge/key" bs=32 count=1 status=none
    chown -R "$(id -u):$(id -g)" "$folder/munge"
    chmod 600 "$folder/munge/key"
    local ports; read -ra ports < <(python3 - "$count" <<'PORTS'
import socket, sys
held = [socket.socket() for _ in range(1 + int(sys.argv[1]))]
for s in held: s.bind(("127.0.0.1", 0))
print(*(s.getsockname()[1] for s in held))
PORTS
)
    local nodes=() lines=''
    for ((n = 1; n <= count; n++)); do
        [ "$count" -eq 1 ] && nodes=("$(hostname -s)") || nodes+=("127.0.0.$n")
        lines+="NodeName=${nodes[n-1]} NodeHostname=$(hostname -s) NodeAddr=127.0.0.$n Port=${ports[n]} CPUs=$(nproc) State=UNKNOWN"$'\n'
    done
    cat >"$folder/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=${ports[0]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge/socket
CryptoType=crypto/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool/%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd-%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd-%n.log
KillWait=30
ReturnToService=2
MpiDefault=none
JobRequeue=1
SchedulerParameters=sched_interval=1,batch_sched_delay=0
${lines}PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
    munged --force --key-file="$folder/munge/key" --socket="$folder/munge/socket" --pid-file="$folder/munge/pid" \
        --log-file="$folder/munge/log" --seed-file="$folder/munge/seed"
    slurmctld -f "$folder/slurm.conf"
    for node in "${nodes[@]}"; do
        mkdir -p "$folder/spool/$node"
        slurmd -f "$folder/slurm.conf" -N "$node"
    done
    for _ in $(seq 60); do
        SLURM_CONF="$folder/slurm.conf" sinfo -h -o %T 2>/dev/null | grep -q idle && return
        sleep 0.5
    done
    echo "the nodes did not become idle; see $folder/slurmctld.log" >&2
    return 1
}

down() {
    for file in "$folder"/slurmd-*.pid "$folder/slurmctld.pid" "$folder/munge/pid"; do
        [ ! -f "$file" ] || kill "$(cat "$file")" 2>/dev/null || true
    done
}

"$action"
