#!/usr/bin/env bash
# Bring up, or take down, a Slurm of one node on this machine, from Debian's slurm-wlm and munge; all state in one folder.
#   tests/slurm_node.sh install     tests/slurm_node.sh up FOLDER     tests/slurm_node.sh down FOLDER
# Needs root. Clients find it by SLURM_CONF=FOLDER/slurm.conf.
set -euo pipefail
action=$1 folder=${2:-}

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
    local ports; ports=$(python3 - <<'PORTS'
import socket
held = [socket.socket() for _ in range(2)]
for s in held: s.bind(("127.0.0.1", 0))
print(*(s.getsockname()[1] for s in held))
PORTS
)
    read -r ctld_port d_port <<<"$ports"
    cat >"$folder/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=$ctld_port
SlurmdPort=$d_port
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge/socket
CryptoType=crypto/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
KillWait=30
ReturnToService=2
MpiDefault=none
JobRequeue=1
SchedulerParameters=sched_interval=1,batch_sched_delay=0
NodeName=$(hostname -s) NodeAddr=127.0.0.1 CPUs=$(nproc) State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
    munged --force --key-file="$folder/munge/key" --socket="$folder/munge/socket" --pid-file="$folder/munge/pid" \
        --log-file="$folder/munge/log" --seed-file="$folder/munge/seed"
    slurmctld -f "$folder/slurm.conf"
    slurmd -f "$folder/slurm.conf"
    for _ in $(seq 60); do
        SLURM_CONF="$folder/slurm.conf" sinfo -h -o %T 2>/dev/null | grep -q idle && return
        sleep 0.5
    done
    echo "the node did not become idle; see $folder/slurmctld.log" >&2
    return 1
}

down() {
    for file in slurmd.pid slurmctld.pid munge/pid; do
        [ ! -f "$folder/$file" ] || kill "$(cat "$folder/$file")" 2>/dev/null || true
    done
}

"$action"
