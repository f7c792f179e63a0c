#!/usr/bin/env bash
# Trains, stitches, tests and reports a study on a SLURM cluster; prints the job ids.
#
#   slurm/submit.sh CONFIG [options]       as those of `expertdiff launch`, for example --dry-run
#
# Again for the same study: submits what is not finished.
set -euo pipefail
[ $# -gt 0 ] || { sed -n '2,7s/^# \{0,1\}//p' "$0"; exit 2; }
exec expertdiff launch --slurm "$(dirname "$0")/site.sh" --config "$@"
