#include "train/distributed/environment.h"

#include <cstdlib>
#include <optional>

#include "base/error.h"
#include "base/rng.h"
#include "base/strings.h"

namespace caldera {
namespace {

std::optional<std::string> text(const char* name) {
  const char* value = std::getenv(name);
  return value != nullptr && *value != '\0' ? std::optional<std::string>(value) : std::nullopt;
}

std::optional<int> number(const char* name) {
  const std::optional<std::string> value = text(name);
  if (!value) return std::nullopt;
  CALDERA_CHECK(value->size() < 9 && value->find_first_not_of("0123456789") == std::string::npos,
                DistributedError, "{}=\"{}\" in the environment: expected a number", name, *value);
  return std::stoi(*value);
}

int needed(const char* name, const std::string& started_by) {
  const std::optional<int> value = number(name);
  CALDERA_CHECK(value, DistributedError, "started by {}, but {} is not set in the environment", started_by,
                name);
  return *value;
}

// A port that all processes of a job derive alike.
int port_of_job(const std::string& job) { return 20000 + static_cast<int>(hash_text(job) % 20000); }

// The first name of "node[03-07,9],other": "node03".
std::string first_host(const std::string& list) {
  const size_t bracket = list.find('['), comma = list.find(',');
  if (bracket == std::string::npos || comma < bracket) return list.substr(0, comma);
  const size_t end = list.find_first_of(",-]", bracket);
  return list.substr(0, bracket) + list.substr(bracket + 1, end - bracket - 1);
}

// MASTER_ADDR; an IPv6 address may stand in brackets there, as in "[fd77::10]".
std::optional<std::string> address_of_master() {
  std::optional<std::string> address = text("MASTER_ADDR");
  if (address && address->size() > 2 && address->front() == '[' && address->back() == ']')
    return address->substr(1, address->size() - 2);
  return address;
}

// torchrun's own number may be "none" for all runs; two that go on at the same time meet at different places.
std::string run_id_of(const std::string& started_by) {
  if (const auto id = text("CALDERA_RUN_ID")) return *id;
  if (const auto id = text("TORCHELASTIC_RUN_ID"))
    return fmt::format("torchrun:{}:{}:{}", *id, text("MASTER_ADDR").value_or(""),
                       text("MASTER_PORT").value_or(""));
  const auto job = text("SLURM_JOB_ID");
  return job && !started_by.empty() ? "slurm:" + *job : "";
}

void take_address(WorldSpec& spec, const std::string& job) {
  if (const auto address = address_of_master())
    spec.address = *address;
  else
    CALDERA_CHECK(spec.local_size == spec.size, DistributedError,
                  "started by {} on several machines, but MASTER_ADDR (the machine of rank 0) is not set; "
                  "pass it to all "
                  "ranks, with mpirun by -x MASTER_ADDR=HOST",
                  spec.started_by);
  spec.port = number("MASTER_PORT").value_or(port_of_job(job));
}

WorldSpec from_variables() {
  WorldSpec spec;
  spec.group_of_one = text("CALDERA_GROUP_OF_ONE") == "1";
  if (text("RANK") && text("WORLD_SIZE")) {
    spec.started_by = text("CALDERA_LAUNCH") ? "caldera launch" : "torchrun";
    spec.rank = needed("RANK", spec.started_by);
    spec.size = needed("WORLD_SIZE", spec.started_by);
    spec.local_rank = number("LOCAL_RANK").value_or(spec.rank);
    spec.local_size = number("LOCAL_WORLD_SIZE").value_or(spec.size);
    spec.attempt = number("TORCHELASTIC_RESTART_COUNT").value_or(0);
    spec.store_is_hosted = text("TORCHELASTIC_USE_AGENT_STORE") == "True";
    spec.address = address_of_master().value_or(spec.address);
    spec.port = spec.size > 1 || spec.group_of_one ? needed("MASTER_PORT", spec.started_by) : 0;
  } else if (text("OMPI_COMM_WORLD_SIZE")) {
    spec.started_by = "mpirun";
    spec.rank = needed("OMPI_COMM_WORLD_RANK", spec.started_by);
    spec.size = needed("OMPI_COMM_WORLD_SIZE", spec.started_by);
    spec.local_rank = number("OMPI_COMM_WORLD_LOCAL_RANK").value_or(spec.rank);
    spec.local_size = number("OMPI_COMM_WORLD_LOCAL_SIZE").value_or(spec.size);
    take_address(spec, text("OMPI_MCA_ess_base_jobid").value_or(text("PMIX_NAMESPACE").value_or("mpi")));
  } else if (text("MPI_LOCALNRANKS") && text("PMI_SIZE")) {
    spec.started_by = "mpirun";
    spec.rank = needed("PMI_RANK", spec.started_by);
    spec.size = needed("PMI_SIZE", spec.started_by);
    spec.local_rank = number("MPI_LOCALRANKID").value_or(spec.rank);
    spec.local_size = number("MPI_LOCALNRANKS").value_or(spec.size);
    take_address(spec, text("PMI_ID").value_or("mpich"));
  } else if (text("SLURM_STEP_ID") && number("SLURM_STEP_NUM_TASKS").value_or(1) > 1) {
    // Without SLURM_STEP_ID this is the batch script itself, a single process.
    spec.started_by = "srun";
    spec.rank = needed("SLURM_PROCID", spec.started_by);
    spec.size = needed("SLURM_STEP_NUM_TASKS", spec.started_by);
    spec.local_rank = needed("SLURM_LOCALID", spec.started_by);
    const int num_nodes = number("SLURM_STEP_NUM_NODES").value_or(number("SLURM_NNODES").value_or(1));
    spec.local_size =
        num_nodes == 1 ? spec.size : number("SLURM_NTASKS_PER_NODE").value_or(spec.size / num_nodes);
    // One machine's own name may lead nowhere.
    const std::string first =
        num_nodes == 1 ? "127.0.0.1" : first_host(text("SLURM_STEP_NODELIST").value_or("127.0.0.1"));
    spec.address = address_of_master().value_or(first);
    spec.port = number("MASTER_PORT")
                    .value_or(port_of_job(text("SLURM_JOB_ID").value_or("0") + "." + *text("SLURM_STEP_ID")));
    spec.attempt = number("SLURM_RESTART_COUNT").value_or(0);
  }
  spec.run_id = run_id_of(spec.started_by);
  return spec;
}

}  // namespace

WorldSpec world_from_environment() {
  WorldSpec spec = from_variables();
  CALDERA_CHECK(!spec.group_of_one || !spec.started_by.empty(), DistributedError,
                "CALDERA_GROUP_OF_ONE=1: also set RANK=0 WORLD_SIZE=1 MASTER_PORT=..., or start it by a launcher");
  CALDERA_CHECK(spec.size > 0 && spec.rank < spec.size && spec.local_rank < spec.local_size, DistributedError,
                "started by {}: rank {} of {}, local rank {} of {}: the environment contradicts itself",
                spec.started_by, spec.rank, spec.size, spec.local_rank, spec.local_size);
  return spec;
}

}  // namespace caldera
