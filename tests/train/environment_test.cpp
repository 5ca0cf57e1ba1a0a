// Who a process is, from the variables of what started it.
#include "train/distributed/environment.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <stdlib.h>

#include <map>

#include "base/error.h"

namespace caldera {
namespace {

using testing::HasSubstr;
using testing::ThrowsMessage;

// Sets variables, and removes all that matter and are not set, while it lives.
class Environment {
 public:
  explicit Environment(const std::map<std::string, std::string>& variables) {
    for (const char* name : kNames) ::unsetenv(name);
    for (const auto& [name, value] : variables) ::setenv(name.c_str(), value.c_str(), 1);
  }
  ~Environment() {
    for (const char* name : kNames) ::unsetenv(name);
  }

 private:
  static constexpr std::array kNames = {"RANK",
                                        "WORLD_SIZE",
                                        "LOCAL_RANK",
                                        "LOCAL_WORLD_SIZE",
                                        "MASTER_ADDR",
                                        "MASTER_PORT",
                                        "CALDERA_LAUNCH",
                                        "CALDERA_GROUP_OF_ONE",
                                        "CALDERA_RUN_ID",
                                        "TORCHELASTIC_RUN_ID",
                                        "TORCHELASTIC_USE_AGENT_STORE",
                                        "TORCHELASTIC_RESTART_COUNT",
                                        "OMPI_COMM_WORLD_RANK",
                                        "OMPI_COMM_WORLD_SIZE",
                                        "OMPI_COMM_WORLD_LOCAL_RANK",
                                        "OMPI_COMM_WORLD_LOCAL_SIZE",
                                        "OMPI_MCA_ess_base_jobid",
                                        "PMIX_NAMESPACE",
                                        "PMI_RANK",
                                        "PMI_SIZE",
                                        "MPI_LOCALRANKID",
                                        "MPI_LOCALNRANKS",
                                        "SLURM_STEP_ID",
                                        "SLURM_STEP_NUM_TASKS",
                                        "SLURM_STEP_NUM_NODES",
                                        "SLURM_PROCID",
                                        "SLURM_LOCALID",
                                        "SLURM_STEP_NODELIST",
                                        "SLURM_JOB_ID",
                                        "SLURM_NTASKS_PER_NODE",
                                        "SLURM_RESTART_COUNT"};
};

TEST(WorldFromEnvironment, NothingSetIsASingleProcess) {
  const Environment environment({});
  EXPECT_EQ(world_from_environment().size, 1);
  EXPECT_EQ(world_from_environment().started_by, "");
}

TEST(WorldFromEnvironment, AGroupOfOneNeedsAPlaceToMeet) {
  const auto complaint = [](std::map<std::string, std::string> variables) -> std::string {
    variables["CALDERA_GROUP_OF_ONE"] = "1";
    const Environment environment(variables);
    try {
      EXPECT_TRUE(world_from_environment().group_of_one);
      return "";
    } catch (const DistributedError& error) {
      return error.what();
    }
  };
  EXPECT_THAT(complaint({}), testing::HasSubstr("CALDERA_GROUP_OF_ONE=1: also set RANK=0 WORLD_SIZE=1 MASTER_PORT"));
  EXPECT_THAT(complaint({{"RANK", "0"}, {"WORLD_SIZE", "1"}}), testing::HasSubstr("MASTER_PORT is not set"));
  EXPECT_EQ(complaint({{"RANK", "0"}, {"WORLD_SIZE", "1"}, {"MASTER_PORT", "29500"}}), "");
}

TEST(WorldFromEnvironment, Torchrun) {
  const Environment environment({{"RANK", "3"},
                                 {"WORLD_SIZE", "4"},
                                 {"LOCAL_RANK", "1"},
                                 {"LOCAL_WORLD_SIZE", "2"},
                                 {"MASTER_ADDR", "node0"},
                                 {"MASTER_PORT", "29500"},
                                 {"TORCHELASTIC_USE_AGENT_STORE", "True"},
                                 {"TORCHELASTIC_RESTART_COUNT", "2"}});
  const WorldSpec spec = world_from_environment();
  EXPECT_EQ(spec.started_by, "torchrun");
  EXPECT_EQ(spec.rank, 3);
  EXPECT_EQ(spec.local_rank, 1);
  EXPECT_EQ(spec.address, "node0");
  EXPECT_EQ(spec.port, 29500);
  EXPECT_EQ(spec.attempt, 2);
  EXPECT_TRUE(spec.store_is_hosted);
}

TEST(WorldFromEnvironment, OpenMpiOnOneMachineNeedsNoAddress) {
  const std::map<std::string, std::string> variables = {{"OMPI_COMM_WORLD_RANK", "1"},
                                                        {"OMPI_COMM_WORLD_SIZE", "2"},
                                                        {"OMPI_COMM_WORLD_LOCAL_RANK", "1"},
                                                        {"OMPI_COMM_WORLD_LOCAL_SIZE", "2"},
                                                        {"OMPI_MCA_ess_base_jobid", "1234"}};
  int port = 0;
  {
    const Environment environment(variables);
    const WorldSpec spec = world_from_environment();
    EXPECT_EQ(spec.started_by, "mpirun");
    EXPECT_EQ(spec.rank, 1);
    EXPECT_EQ(spec.address, "127.0.0.1");
    port = spec.port;
    EXPECT_THAT(port, testing::AllOf(testing::Ge(20000), testing::Lt(40000)));
  }
  auto other_job = variables;
  other_job["OMPI_MCA_ess_base_jobid"] = "1235";
  const Environment environment(other_job);
  EXPECT_NE(world_from_environment().port, port);
}

TEST(WorldFromEnvironment, OpenMpiOnSeveralMachinesAsksForTheAddress) {
  const Environment environment({{"OMPI_COMM_WORLD_RANK", "1"},
                                 {"OMPI_COMM_WORLD_SIZE", "4"},
                                 {"OMPI_COMM_WORLD_LOCAL_RANK", "1"},
                                 {"OMPI_COMM_WORLD_LOCAL_SIZE", "2"}});
  EXPECT_THAT(world_from_environment, ThrowsMessage<DistributedError>(HasSubstr("-x MASTER_ADDR=HOST")));
}

TEST(WorldFromEnvironment, SrunTakesTheFirstNode) {
  std::map<std::string, std::string> variables = {{"SLURM_STEP_ID", "0"},
                                                  {"SLURM_STEP_NUM_TASKS", "8"},
                                                  {"SLURM_STEP_NUM_NODES", "2"},
                                                  {"SLURM_PROCID", "5"},
                                                  {"SLURM_LOCALID", "1"},
                                                  {"SLURM_JOB_ID", "77"},
                                                  {"SLURM_STEP_NODELIST", "gpu[03-04,9]"}};
  {
    const Environment environment(variables);
    const WorldSpec spec = world_from_environment();
    EXPECT_EQ(spec.started_by, "srun");
    EXPECT_EQ(spec.rank, 5);
    EXPECT_EQ(spec.local_size, 4);
    EXPECT_EQ(spec.address, "gpu03");
  }
  variables["SLURM_STEP_NODELIST"] = "alpha,beta";
  {
    const Environment environment(variables);
    EXPECT_EQ(world_from_environment().address, "alpha");
  }
  variables.erase("SLURM_STEP_ID");  // the batch script itself
  const Environment environment(variables);
  EXPECT_EQ(world_from_environment().size, 1);
}

// A single node's own name may lead nowhere.
TEST(WorldFromEnvironment, SrunOnOneNodeMeetsAtTheLoopback) {
  std::map<std::string, std::string> variables = {
      {"SLURM_STEP_ID", "0"},          {"SLURM_STEP_NUM_TASKS", "2"}, {"SLURM_STEP_NUM_NODES", "1"},
      {"SLURM_PROCID", "1"},           {"SLURM_LOCALID", "1"},        {"SLURM_JOB_ID", "77"},
      {"SLURM_STEP_NODELIST", "gpu03"}};
  {
    const Environment environment(variables);
    EXPECT_EQ(world_from_environment().address, "127.0.0.1");
  }
  variables["MASTER_ADDR"] = "[fd77::10]";
  const Environment environment(variables);
  EXPECT_EQ(world_from_environment().address, "fd77::10");
}

TEST(WorldFromEnvironment, ARunHasAnIdOfItsOwn) {
  const auto id_of = [](const std::map<std::string, std::string>& variables) {
    const Environment environment(variables);
    return world_from_environment().run_id;
  };
  std::map<std::string, std::string> variables = {
      {"RANK", "0"}, {"WORLD_SIZE", "2"}, {"MASTER_PORT", "29500"}};
  EXPECT_EQ(id_of({}), "");
  EXPECT_EQ(id_of({{"SLURM_JOB_ID", "77"}}), "") << "a single process in a job";
  EXPECT_EQ(id_of(variables), "");
  variables["SLURM_JOB_ID"] = "77";
  EXPECT_EQ(id_of(variables), "slurm:77");
  variables["MASTER_ADDR"] = "node0";
  variables["TORCHELASTIC_RUN_ID"] = "none";
  EXPECT_EQ(id_of(variables), "torchrun:none:node0:29500");
  variables["CALDERA_RUN_ID"] = "12ab";
  EXPECT_EQ(id_of(variables), "12ab");
}

TEST(WorldFromEnvironment, WhatContradictsItselfIsRefused) {
  {
    const Environment environment({{"RANK", "2"}, {"WORLD_SIZE", "2"}, {"MASTER_PORT", "1"}});
    EXPECT_THAT(world_from_environment, ThrowsMessage<DistributedError>(HasSubstr("rank 2 of 2")));
  }
  {
    const Environment environment({{"RANK", "one"}, {"WORLD_SIZE", "2"}});
    EXPECT_THAT(world_from_environment, ThrowsMessage<DistributedError>(HasSubstr("RANK=\"one\"")));
  }
  const Environment environment({{"RANK", "1"}, {"WORLD_SIZE", "2"}});
  EXPECT_THAT(world_from_environment, ThrowsMessage<DistributedError>(HasSubstr("MASTER_PORT is not set")));
}

}  // namespace
}  // namespace caldera
