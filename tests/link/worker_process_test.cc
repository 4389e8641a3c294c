// refocus-worker as it is started, alone and by mpirun, against a coordinator in this process: what it answers and how
// it ends.
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cmath>
#include <condition_variable>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <thread>

#include "base/limits.h"
#include "base/status.h"
#include "refocus/internal/v1/group.grpc.pb.h"

namespace refocus {
namespace {

namespace pb = internal::v1;
using Clock = std::chrono::steady_clock;
using Stream = grpc::ServerReaderWriter<pb::CoordinatorMessage, pb::WorkerMessage>;

constexpr int64_t kEpoch = 3;
constexpr int kPatienceSeconds = 60;
constexpr char kModel[] = REFOCUS_SOURCE_DIR "/tests/golden/llama";
constexpr int kVocab = 251;

// Forms one group of `size` ranks and passes messages.
class Group : public pb::GroupService::Service {
 public:
  explicit Group(int size) : size_(size) {
    grpc::ServerBuilder builder;
    int port = 0;
    builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
    builder.RegisterService(this);
    server_ = builder.BuildAndStart();
    address_ = "127.0.0.1:" + std::to_string(port);
  }
  ~Group() override { Stop(); }

  void Stop() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      stopping_ = true;
      wake_.notify_all();
    }
    if (server_) server_->Shutdown(std::chrono::system_clock::now());
    server_.reset();
  }
  const std::string& address() const { return address_; }

  bool WaitReady() {
    return Wait([&] { return ready_ == size_; });
  }
  bool WaitHellos(int count) {
    return Wait([&] { return static_cast<int>(hellos_.size()) >= count; });
  }
  // Until the rank says that it executes the last command.
  bool WaitRunning(int rank) {
    return Wait([&] { return running_[rank] == seq_; });
  }
  pid_t pid(int rank) {
    const std::lock_guard<std::mutex> lock(mutex_);
    return static_cast<pid_t>(hellos_[rank].pid());
  }
  std::map<int, pb::Hello> hellos() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return hellos_;
  }

  // To all ranks, as the next command.
  void Send(const std::function<void(pb::Command&)>& fill) {
    pb::CoordinatorMessage message;
    message.mutable_command()->set_epoch(kEpoch);
    message.mutable_command()->set_seq(++seq_);
    message.mutable_command()->set_job(1);
    fill(*message.mutable_command());
    SendAll(message);
  }
  void SendShutdown(bool planned) {
    pb::CoordinatorMessage message;
    message.mutable_shutdown()->set_reason("test is over");
    message.mutable_shutdown()->set_planned(planned);
    SendAll(message);
  }

  // The final results of the last command, by rank; what came before them is merged in (tokens).
  std::map<int, pb::Result> Finals() {
    std::map<int, pb::Result> finals;
    for (int rank = 0; rank < size_; ++rank) {
      pb::Result sum;
      do {
        pb::Result next;
        const bool came = Wait([&] { return !results_[rank].empty(); });
        EXPECT_TRUE(came) << "no result from rank " << rank << " for command " << seq_;
        if (!came) return {};
        {
          const std::lock_guard<std::mutex> lock(mutex_);
          next = results_[rank].front();
          results_[rank].pop_front();
        }
        EXPECT_EQ(next.seq(), seq_);
        EXPECT_EQ(next.epoch(), kEpoch);
        pb::Result tokens;
        tokens.mutable_tokens()->Swap(sum.mutable_tokens());
        tokens.MergeFrom(next);
        sum = tokens;
      } while (!sum.final());
      finals[rank] = sum;
    }
    return finals;
  }

  grpc::Status Join(grpc::ServerContext*, Stream* stream) override {
    pb::WorkerMessage message;
    if (!stream->Read(&message) || !message.has_hello()) return grpc::Status::OK;
    const int rank = message.hello().rank();
    {
      std::unique_lock<std::mutex> lock(mutex_);
      hellos_[rank] = message.hello();
      streams_[rank] = stream;
      wake_.notify_all();
      if (!wake_.wait_for(lock, std::chrono::seconds(kPatienceSeconds),
                          [&] { return stopping_ || static_cast<int>(hellos_.size()) == size_; }) ||
          stopping_) {
        return grpc::Status(grpc::StatusCode::UNAVAILABLE, "ranks are missing");
      }
    }
    pb::CoordinatorMessage form;
    form.mutable_form_group()->set_epoch(kEpoch);
    form.mutable_form_group()->set_size(size_);
    stream->Write(form);
    while (stream->Read(&message)) {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (message.has_ready()) ++ready_;
      if (message.has_heartbeat()) running_[rank] = message.heartbeat().running_seq();
      if (message.has_result()) results_[rank].push_back(message.result());
      wake_.notify_all();
    }
    const std::lock_guard<std::mutex> lock(mutex_);
    streams_.erase(rank);
    return grpc::Status::OK;
  }

 private:
  bool Wait(const std::function<bool()>& condition) {
    std::unique_lock<std::mutex> lock(mutex_);
    return wake_.wait_for(lock, std::chrono::seconds(kPatienceSeconds), condition);
  }
  void SendAll(const pb::CoordinatorMessage& message) {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const auto& [rank, stream] : streams_) stream->Write(message);
  }

  const int size_;
  std::string address_;
  std::unique_ptr<grpc::Server> server_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::map<int, pb::Hello> hellos_;
  std::map<int, Stream*> streams_;
  std::map<int, std::deque<pb::Result>> results_;
  std::map<int, int64_t> running_;
  int ready_ = 0;
  bool stopping_ = false;
  int64_t seq_ = 0;
};

// A child of this test; killed when it outlives its owner.
class Child {
 public:
  explicit Child(std::vector<std::string> command) {
    std::vector<char*> arguments;
    for (std::string& word : command) arguments.push_back(word.data());
    arguments.push_back(nullptr);
    pid_ = fork();
    if (pid_ == 0) {
      execvp(arguments[0], arguments.data());
      _exit(127);
    }
  }
  ~Child() {
    if (pid_ <= 0) return;
    kill(pid_, SIGKILL);
    waitpid(pid_, nullptr, 0);
  }
  pid_t pid() const { return pid_; }

  // The exit code, 128 + signal, or -1 when it still runs after `seconds`.
  int WaitForEnd(double seconds) {
    const Clock::time_point begin = Clock::now();
    while (std::chrono::duration<double>(Clock::now() - begin).count() < seconds) {
      int status = 0;
      if (waitpid(pid_, &status, WNOHANG) == pid_) {
        pid_ = -1;
        return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
      }
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
    return -1;
  }

 private:
  pid_t pid_ = -1;
};

std::vector<std::string> Worker(const std::string& coordinator, std::vector<std::string> more = {}) {
  std::vector<std::string> command{REFOCUS_BIN_DIR "/refocus-worker", "--model", kModel, "--coordinator", coordinator,
                                   "--kv-memory", "64MiB", "--threads", "1"};
  command.insert(command.end(), more.begin(), more.end());
  return command;
}

std::vector<std::string> Mpirun(int ranks, std::vector<std::string> worker) {
  // Kills the rest of a failed launch at once instead of a second after it has asked.
  std::vector<std::string> command{REFOCUS_MPIEXEC, "--mca", "odls_base_sigkill_timeout", "0", "--oversubscribe",
                                   "-np", std::to_string(ranks)};
  command.insert(command.end(), worker.begin(), worker.end());
  return command;
}

uint32_t TokenAt(int64_t position) { return static_cast<uint32_t>(position * 7 % 200 + 3); }

void Prefill(Group& group, int64_t first, int64_t rows) {
  group.Send([&](pb::Command& c) {
    c.mutable_prefill_chunk()->set_context(1);
    c.mutable_prefill_chunk()->set_first_pos(first);
    for (int64_t p = first; p < first + rows; ++p) c.mutable_prefill_chunk()->add_ids(TokenAt(p));
  });
}

void OpenContext(Group& group) {
  group.Send([](pb::Command& c) {
    c.mutable_open_context()->set_context(1);
    c.mutable_open_context()->set_capacity(600);
  });
}

void ExpectAll(Group& group, StatusCode code, const char* what) {
  const auto finals = group.Finals();
  EXPECT_FALSE(finals.empty());
  for (const auto& [rank, result] : finals) {
    EXPECT_EQ(result.code(), static_cast<int>(code)) << what << ", rank " << rank << ": " << result.message();
  }
}

struct Served {
  std::vector<uint32_t> ids;   // of the answers
  std::vector<double> values;  // loss and gradient norm of each step, loss after them, the answers' log-probabilities
};

// Adapter 9 of context 1, revision 1: two steps on two spans, one of them over several blocks.
void Adapt(Group& group, Served* served) {
  const auto add_span = [](auto* command, int64_t start, int64_t rows) {
    pb::Span* span = command->add_spans();
    span->set_start(start);
    for (int64_t p = start; p <= start + rows; ++p) span->add_ids(TokenAt(p));
  };
  group.Send([](pb::Command& c) {
    pb::BeginAdapt* begin = c.mutable_begin_adapt();
    begin->set_context(1);
    begin->set_adapter(9);
    begin->set_clip_norm(1.0F);
    begin->set_beta1(0.9F);
    begin->set_beta2(0.999F);
    begin->set_epsilon(1e-8F);
  });
  ExpectAll(group, StatusCode::kOk, "begin");
  for (const int64_t step : {1, 2}) {
    group.Send([&](pb::Command& c) {
      c.mutable_adapt_step()->set_adapter(9);
      c.mutable_adapt_step()->set_step(step);
      c.mutable_adapt_step()->set_learning_rate(0.01F);
      add_span(c.mutable_adapt_step(), 500, 37);
      add_span(c.mutable_adapt_step(), 100, 300);
    });
    auto finals = group.Finals();
    for (const auto& [rank, result] : finals) EXPECT_EQ(result.code(), 0) << rank << ": " << result.message();
    served->values.insert(served->values.end(), {finals[0].loss(), finals[0].grad_norm()});
  }
  group.Send([&](pb::Command& c) {
    c.mutable_probe_loss()->set_adapter(9);
    add_span(c.mutable_probe_loss(), 500, 37);
  });
  auto finals = group.Finals();
  EXPECT_NE(finals[0].agree(), 0U);
  for (const auto& [rank, result] : finals) EXPECT_EQ(result.agree(), finals[0].agree()) << "delta of rank " << rank;
  served->values.push_back(finals[0].loss());
  group.Send([](pb::Command& c) {
    c.mutable_end_adapt()->set_adapter(9);
    c.mutable_end_adapt()->set_commit(true);
    c.mutable_end_adapt()->set_revision(1);
  });
  ExpectAll(group, StatusCode::kOk, "end");
}

// Seven tokens after the context and a prompt, with base queries (adapter 0) or adapter 9.
void Ask(Group& group, int64_t context_tokens, uint64_t adapter, Served* served) {
  group.Send([&](pb::Command& c) {
    c.mutable_open_sequence()->set_sequence(5 + adapter);
    c.mutable_open_sequence()->set_context(1);
    c.mutable_open_sequence()->set_adapter(adapter);
    c.mutable_open_sequence()->set_revision(adapter == 0 ? 0 : 1);
    c.mutable_open_sequence()->set_capacity(20);
  });
  ExpectAll(group, StatusCode::kOk, "open sequence");
  const auto take_tokens = [&] {
    const auto finals = group.Finals();
    for (const auto& [rank, result] : finals) {
      EXPECT_EQ(result.code(), 0) << "rank " << rank << ": " << result.message();
      for (const pb::Token& token : result.tokens()) {  // rank 0's only
        served->ids.push_back(token.id());
        served->values.push_back(token.logprob());
      }
    }
  };
  group.Send([&](pb::Command& c) {
    c.mutable_extend_sequence()->set_sequence(5 + adapter);
    c.mutable_extend_sequence()->set_first_pos(context_tokens);
    for (const uint32_t id : {17, 4, 99}) c.mutable_extend_sequence()->add_ids(id);
    c.mutable_extend_sequence()->set_sample(true);
  });
  take_tokens();
  group.Send([&](pb::Command& c) {
    c.mutable_decode_steps()->add_sequences(5 + adapter);
    c.mutable_decode_steps()->set_steps(6);
  });
  take_tokens();
}

// A context over several blocks, two commands that are refused, an adaptation, and answers without and with it.
Served Serve(Group& group) {
  constexpr int64_t kTokens = 600;
  group.Send([](pb::Command& c) {
    c.mutable_open_context()->set_context(1);
    c.mutable_open_context()->set_capacity(kTokens);
  });
  ExpectAll(group, StatusCode::kOk, "open");
  Prefill(group, 0, 301);
  ExpectAll(group, StatusCode::kOk, "prefill");
  group.Send([](pb::Command& c) {
    c.mutable_prefill_chunk()->set_context(1);
    c.mutable_prefill_chunk()->set_first_pos(301);
    c.mutable_prefill_chunk()->add_ids(kVocab);
  });
  ExpectAll(group, StatusCode::kInvalidArgument, "id outside the vocabulary");
  group.Send([](pb::Command&) {});
  ExpectAll(group, StatusCode::kInvalidArgument, "no command");
  Prefill(group, 301, kTokens - 301);
  ExpectAll(group, StatusCode::kOk, "prefill");
  Served served;
  Adapt(group, &served);
  Ask(group, kTokens, 0, &served);
  Ask(group, kTokens, 9, &served);
  group.Send([](pb::Command& c) { c.mutable_close_context()->set_context(1); });
  const auto finals = group.Finals();
  for (const auto& [rank, result] : finals) EXPECT_EQ(result.kv_used_bytes(), 0) << "rank " << rank;
  return served;
}

TEST(WorkerProcessTest, ServesAloneAndByMpirunAndEndsAsPlanned) {
  std::vector<Served> served;
  for (const int ranks : {1, 2, 3}) {
    Group group(ranks);
    Child child(ranks == 1 ? Worker(group.address()) : Mpirun(ranks, Worker(group.address())));
    ASSERT_TRUE(group.WaitReady()) << ranks << " ranks";
    const auto hellos = group.hellos();
    ASSERT_EQ(static_cast<int>(hellos.size()), ranks);
    for (const auto& [rank, hello] : hellos) {
      EXPECT_EQ(hello.size(), ranks);
      EXPECT_EQ(hello.nonce(), hellos.at(0).nonce());
      EXPECT_EQ(hello.nonce().size(), 32U);
      EXPECT_EQ(hello.model_fingerprint(), hellos.at(0).model_fingerprint());
      EXPECT_EQ(hello.weights_hash(), hellos.at(0).weights_hash());
      EXPECT_EQ(hello.weights_hash().size(), 16U);
      EXPECT_EQ(hello.weights_hash().find_first_not_of("0123456789abcdef"), std::string::npos);
      EXPECT_EQ(hello.kv_capacity_bytes(), 64 << 20);
      EXPECT_EQ(hello.kv_bytes_per_token(), 2 * 2 * 3 * 80 * 4);
      EXPECT_EQ(hello.kv_dtype(), "fp32");
      EXPECT_GT(hello.weight_bytes(), 100'000);
    }
    served.push_back(Serve(group));
    group.SendShutdown(true);
    EXPECT_EQ(child.WaitForEnd(20.0), kExitOk) << ranks << " ranks";
  }
  constexpr size_t kSteps = 5;  // values before those of the answers
  const std::vector<double>& values = served[0].values;
  ASSERT_EQ(served[0].ids.size(), 14U);
  ASSERT_EQ(values.size(), kSteps + 14);
  EXPECT_LT(values[2], values[0]) << "the second step's loss";
  EXPECT_GT(std::abs(values[kSteps + 7] - values[kSteps]), 1e-3) << "the adapter changes the answer";
  for (const Served& other : {served[1], served[2]}) {
    EXPECT_EQ(other.ids, served[0].ids);
    ASSERT_EQ(other.values.size(), values.size());
    for (size_t i = 0; i < values.size(); ++i) EXPECT_NEAR(other.values[i], values[i], i < kSteps ? 1e-5 : 1e-4) << i;
  }
}

// A group of one needs neither mpirun nor MPI.
TEST(WorkerProcessTest, ServesByItself) {
  Group group(1);
  Child child(Worker(group.address(), {"--group-size", "1"}));
  ASSERT_TRUE(group.WaitReady());
  EXPECT_EQ(group.hellos().at(0).nonce().size(), 32U);
  EXPECT_FALSE(group.hellos().at(0).wants_rank());
  EXPECT_EQ(Serve(group).ids.size(), 14U);
  group.SendShutdown(true);
  EXPECT_EQ(child.WaitForEnd(20.0), kExitOk);
}

TEST(WorkerProcessTest, KilledRankEndsTheLaunch) {
  Group group(3);
  Child child(Mpirun(3, Worker(group.address())));
  ASSERT_TRUE(group.WaitReady());
  kill(group.pid(2), SIGKILL);
  const int code = child.WaitForEnd(10.0);
  EXPECT_NE(code, -1);
  EXPECT_NE(code, kExitOk);
}

TEST(WorkerProcessTest, FrozenRankEndsTheLaunchWithinTheDeadline) {
  Group group(2);
  Child child(Mpirun(2, Worker(group.address(), {"--collective-deadline", "1"})));
  ASSERT_TRUE(group.WaitReady());
  kill(group.pid(1), SIGSTOP);
  OpenContext(group);
  EXPECT_EQ(child.WaitForEnd(10.0), kExitGroup);
}

// A rank that waits in a collective must not wait for its deadline first.
TEST(WorkerProcessTest, UnplannedShutdownEndsABusyRankAtOnce) {
  Group group(2);
  Child child(Mpirun(2, Worker(group.address())));
  ASSERT_TRUE(group.WaitReady());
  kill(group.pid(1), SIGSTOP);
  OpenContext(group);
  ASSERT_TRUE(group.WaitRunning(0));
  group.SendShutdown(false);
  EXPECT_EQ(child.WaitForEnd(3.0), kExitGroup);
}

TEST(WorkerProcessTest, UnplannedShutdownIsAFailureOfIdleRanksToo) {
  Group group(2);
  Child child(Mpirun(2, Worker(group.address())));
  ASSERT_TRUE(group.WaitReady());
  group.SendShutdown(false);
  EXPECT_EQ(child.WaitForEnd(3.0), kExitGroup);
}

// A planned end that fails in a collective leaves messages behind, with which MPI_Finalize would not return.
TEST(WorkerProcessTest, PlannedEndOfARankInAFailedCollectiveIsShort) {
  Group group(2);
  Child child(Mpirun(2, Worker(group.address(), {"--collective-deadline", "1.5"})));
  ASSERT_TRUE(group.WaitReady());
  kill(group.pid(1), SIGSTOP);
  OpenContext(group);
  ASSERT_TRUE(group.WaitRunning(0));
  kill(group.pid(0), SIGTERM);
  EXPECT_NE(child.WaitForEnd(5.0), -1);
}

// The ranks' loads may differ by more than the deadline of a collective.
TEST(WorkerProcessTest, SlowLoadOfOneRankIsWaitedFor) {
  Group group(2);
  const std::vector<std::string> worker = Worker(group.address(), {"--collective-deadline", "0.5"});
  std::vector<std::string> command = Mpirun(1, worker);
  command.insert(command.end(), {":", "-np", "1", "env", "LD_PRELOAD=" REFOCUS_SLOW_READS});
  command.insert(command.end(), worker.begin(), worker.end());
  Child child(command);
  ASSERT_TRUE(group.WaitHellos(1));
  const Clock::time_point first = Clock::now();
  ASSERT_TRUE(group.WaitReady());
  EXPECT_GT(std::chrono::duration<double>(Clock::now() - first).count(), 1.0) << "no slow load: nothing was tested";
  OpenContext(group);
  ExpectAll(group, StatusCode::kOk, "open");
  group.SendShutdown(true);
  EXPECT_EQ(child.WaitForEnd(20.0), kExitOk);
}

TEST(WorkerProcessTest, LostCoordinatorIsAGroupFailure) {
  Group group(2);
  Child child(Mpirun(2, Worker(group.address())));
  ASSERT_TRUE(group.WaitReady());
  group.Stop();
  EXPECT_EQ(child.WaitForEnd(10.0), kExitGroup);
}

TEST(WorkerProcessTest, SignalsArePlannedEnds) {
  for (const auto& [number, code] : {std::pair{SIGTERM, kExitOk}, std::pair{SIGINT, kExitInterrupted}}) {
    Group group(1);
    Child child(Worker(group.address()));
    ASSERT_TRUE(group.WaitReady());
    kill(child.pid(), number);
    EXPECT_EQ(child.WaitForEnd(10.0), code);
  }
  // While it waits for a group that never forms.
  Group group(2);
  Child child(Worker(group.address()));
  for (int i = 0; i < 1000 && group.hellos().empty(); ++i) std::this_thread::sleep_for(std::chrono::milliseconds(10));
  ASSERT_EQ(group.hellos().size(), 1U);
  kill(child.pid(), SIGTERM);
  EXPECT_EQ(child.WaitForEnd(10.0), kExitOk);
}

TEST(WorkerProcessTest, StartFailuresHaveTheirExitCodes) {
  const std::string worker = REFOCUS_BIN_DIR "/refocus-worker";
  const std::string nobody = "127.0.0.1:1";
  std::vector<std::string> blind = Worker(nobody, {"--device", "cuda"});
  blind.insert(blind.begin(), {"env", "CUDA_VISIBLE_DEVICES="});
  const std::pair<std::vector<std::string>, int> cases[] = {
      {{worker, "--version"}, kExitOk},
      {{worker, "--unknown"}, kExitConfig},
      {{worker, "--model", "/nowhere", "--coordinator", nobody}, kExitConfig},
      {Worker("127.0.0.1"), kExitConfig},
      {Worker("127.0.0.1:70000"), kExitConfig},
      {Worker(nobody, {"--kv-memory", "1GiB"}), kExitConfig},  // given twice
      {{worker, "--model", kModel, "--coordinator", nobody, "--kv-memory", "100TiB"}, kExitHardware},
      {Worker(nobody, {"--connect-seconds", "0.3"}), kExitGroup},
      {Worker(nobody, {"--collective", "nccl"}), kExitConfig},
      {Worker(nobody, {"--group-size", "2", "--group-name", "g"}), kExitConfig},
      {Worker(nobody, {"--device", "cuda", "--group-size", "2"}), kExitConfig},  // no name
      {Mpirun(1, Worker(nobody, {"--group-size", "1"})), kExitConfig},
      {blind, kExitHardware}};
  std::deque<Child> children;  // all at once: most of their time is start and end of the process
  for (const auto& [command, code] : cases) children.emplace_back(command);
  for (size_t i = 0; i < children.size(); ++i) EXPECT_EQ(children[i].WaitForEnd(20.0), cases[i].second) << i;
}

}  // namespace
}  // namespace refocus
