# What your cluster wants to know: the only file to edit. `launch --slurm` and every job read it.

# Options of sbatch (`man sbatch`) for each training job; on one node, with one GPU or several.
train=(
    # --partition=gpu
    # --account=my-project
    # --time=24:00:00       # a job that needs longer goes on from its checkpoint by itself
    --gpus=1
    --cpus-per-task=4
)

# The same for the job that stitches, tests and reports (a test that its time limit cuts short begins
# anew), and for encoding latents.
evaluate=("${train[@]}")
latents=("${train[@]}")

# Run by every job before Python. Without it a job finds the Python that submitted it.
setup() {
    # module load cuda
    # source ~/venv/bin/activate
    :
}
