#!/bin/sh
# Prints the GPUs that a Spark worker or executor may use, as Spark's resource discovery wants them:
#   {"name": "gpu", "addresses": ["0", "1"]}
# A GPU is named by its number. Where GPUs are cut into MIG instances, which have no number, by the instances' UUIDs.
# Set it as spark.{worker,executor}.resource.gpu.discoveryScript. It needs nvidia-smi, which comes with the driver.
set -eu

listed=$(nvidia-smi -L)
# "GPU 0: NVIDIA H100 (UUID: GPU-...)", and below it "  MIG 1g.10gb Device 0: (UUID: MIG-...)"
found=$(printf '%s\n' "$listed" | sed -n 's/^ *MIG .*(UUID: \(MIG-[^)]*\)).*/\1/p')
if [ -z "$found" ]; then
  found=$(printf '%s\n' "$listed" | sed -n 's/^GPU \([0-9][0-9]*\):.*/\1/p')
fi
if [ -z "$found" ]; then
  # Spark would have said that resources are missing, and not why.
  echo "nvidia-smi -L names no GPU. No executor could have started. It said: $listed" >&2
  exit 1
fi
printf '%s\n' "$found" | awk '{ list = list (NR > 1 ? ", " : "") "\"" $0 "\"" }
  END { print "{\"name\": \"gpu\", \"addresses\": [" list "]}" }'
