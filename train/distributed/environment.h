// Who this process is among the ranks of a run, from what started it.
#pragma once
#include <cstdint>
#include <string>

namespace caldera {

struct WorldSpec {
  int rank = 0, size = 1;              // of all processes
  int local_rank = 0, local_size = 1;  // of those on this machine; the local rank picks the GPU
  int attempt = 0;                     // how often the launcher has started the run again
  std::string address = "127.0.0.1";   // where the store listens
  int port = 0;
  bool store_is_hosted = false;  // by the launcher; else rank 0 hosts it
  bool group_of_one = false;     // a single rank goes through a process group, too
  std::string started_by;        // "caldera launch", "torchrun", "mpirun", "srun", or "" for a single process
  std::string run_id;  // the same for all attempts of one run, and for no other; "" where it is not known
};

// Reads the variables of `caldera launch` and torchrun (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, ...), of
// Open MPI's and MPICH's mpirun, or of srun. Where mpirun or srun names no port, one is derived from the
// job's number. `run_id` is CALDERA_RUN_ID, which `caldera launch` sets; else torchrun's with the place where
// its ranks meet
// ("torchrun:ID:HOST:PORT"), else Slurm's job ("slurm:77"). CALDERA_GROUP_OF_ONE=1 sets `group_of_one`.
// Throws DistributedError for variables that are missing or contradict each other.
WorldSpec world_from_environment();

}  // namespace caldera
