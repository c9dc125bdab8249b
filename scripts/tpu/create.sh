#!/bin/bash
# A TPU VM (v3-8: one host) or a slice of a pod (v3-32: four hosts), with this repository and its environment:
#
#     NAME=seqrf ZONE=europe-west4-a TYPE=v3-8 bash scripts/tpu/create.sh
#
# Delete it afterwards: gcloud compute tpus tpu-vm delete $NAME --zone=$ZONE. Not run here: there was no TPU.
set -euo pipefail

NAME=${NAME:-seqrf} ZONE=${ZONE:-europe-west4-a} TYPE=${TYPE:-v3-8} VERSION=${VERSION:-tpu-ubuntu2204-base}
REPOSITORY=${REPOSITORY:?the address to clone from}
DISK=${DISK:-}  # an existing disk for data and pairs, mounted at /mnt/disks/data; a slice can only read one

gcloud compute tpus tpu-vm create "$NAME" --zone="$ZONE" --accelerator-type="$TYPE" --version="$VERSION" \
    ${DISK:+--data-disk=source=$DISK,mode=$([ "$TYPE" = v3-8 ] && echo read-write || echo read-only)}

gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all --command="
    set -e
    [ -d seqrf ] || git clone '$REPOSITORY' seqrf
    cd seqrf && bash scripts/requirements.sh tpu
    if [ -n '$DISK' ]; then sudo mkdir -p /mnt/disks/data && sudo mount -o discard,defaults /dev/sdb /mnt/disks/data; fi"
