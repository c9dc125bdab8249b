#!/bin/bash
# A TPU VM (v3-8: one host) or a slice of a pod (v3-32: four hosts), with this repository and its environment:
#
#     REPOSITORY=https://... NAME=seqrf ZONE=europe-west4-a TYPE=v3-8 bash scripts/tpu/create.sh
#
# Delete it afterwards: gcloud compute tpus tpu-vm delete $NAME --zone=$ZONE. Run with gcloud replaced by a script; there
# was no TPU.
set -euo pipefail

NAME=${NAME:-seqrf} ZONE=${ZONE:-europe-west4-a} TYPE=${TYPE:-v3-8} VERSION=${VERSION:-tpu-ubuntu2204-base}
REPOSITORY=${REPOSITORY:?the address to clone from}
DISK=${DISK:-}  # an existing, formatted disk for data and pairs, mounted at /mnt/disks/data; a slice can only read one
[[ $TYPE =~ -[1-8]$ ]] && MODE=read-write || MODE=read-only  # up to eight cores or chips are one host

gcloud compute tpus tpu-vm create "$NAME" --zone="$ZONE" --accelerator-type="$TYPE" --version="$VERSION" \
    ${DISK:+"--data-disk=source=$DISK,mode=$MODE"}

# The image has Python 3.10; SeqRF needs 3.11 or newer.
gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all --command="
    set -e
    [ -d seqrf ] || git clone '$REPOSITORY' seqrf
    python3 -m pip install --quiet --user uv && python3 -m uv python install 3.12
    cd seqrf && PYTHON=\$(python3 -m uv python find 3.12) bash scripts/requirements.sh tpu
    if [ -n '$DISK' ]; then
        sudo mkdir -p /mnt/disks/data && sudo mount -o discard,defaults /dev/sdb /mnt/disks/data
        [ $MODE = read-only ] || sudo chmod a+w /mnt/disks/data
    fi"
