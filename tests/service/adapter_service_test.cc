// Adapters over gRPC: listing, export and import as streams, and files, streams and peers that are not as they should
// be.
#include <algorithm>
#include <functional>
#include <limits>
#include <thread>

#include "base/limits.h"
#include "coordinator/core/digest.h"
#include "tests/service/service_fixture.h"

namespace refocus {
namespace {

class AdapterServiceTest : public ServiceTest {
 protected:
  void SetUp() override {
    StartServer();
    StartGroup(2);
    CreateReady("a", std::string(600, 'a'));
    api::AdaptContextRequest request = AdaptRequest("a");
    request.set_adapter_id("made");
    request.set_lora_rank(3);
    ASSERT_TRUE(Adapt(request).ok());
  }
  void TearDown() override {
    ExpectUnharmed();
    ServiceTest::TearDown();
  }

  grpc::Status Export(const std::string& id, std::string* file, const std::string& context = "contexts/a",
                      int64_t* total = nullptr) {
    grpc::ClientContext call;
    api::ExportAdapterRequest request;
    request.set_name(context);
    request.set_adapter_id(id);
    const auto reader = contexts_->ExportAdapter(&call, request);
    file->clear();
    api::ExportAdapterResponse message;
    while (reader->Read(&message)) {
      if (file->empty() && total != nullptr) *total = message.total_bytes();
      *file += message.data();
    }
    return reader->Finish();
  }

  using Messages = std::vector<api::ImportAdapterRequest>;
  static Messages Sent(const std::string& file, size_t piece, const std::string& context = "contexts/a",
                       const std::string& id = "copy") {
    Messages messages(1);
    messages[0].mutable_header()->set_name(context);
    messages[0].mutable_header()->set_adapter_id(id);
    for (size_t at = 0; at < file.size(); at += piece) messages.emplace_back().set_data(file.substr(at, piece));
    messages.emplace_back().mutable_finish();
    return messages;
  }
  grpc::Status Import(const Messages& messages, api::Adapter* adapter = nullptr) {
    grpc::ClientContext call;
    api::Adapter response;
    const auto writer = contexts_->ImportAdapter(&call, &response);
    for (const auto& message : messages) {
      if (!writer->Write(message)) break;
    }
    writer->WritesDone();
    const grpc::Status status = writer->Finish();
    if (adapter != nullptr) *adapter = response;
    return status;
  }
  std::string Exported(const std::string& id = "made") {
    std::string file;
    const grpc::Status status = Export(id, &file);
    EXPECT_TRUE(status.ok()) << status.error_message();
    return file;
  }
  // With its checksum made right again.
  static std::string Signed(std::string file) {
    file.resize(file.size() - 32);
    Sha256 hash;
    hash.Update(file.data(), file.size());
    return file + hash.Finish();
  }
};

TEST_F(AdapterServiceTest, ListedShownExportedImported) {
  grpc::ClientContext list_call, get_call;
  api::ListAdaptersRequest list;
  list.set_name("contexts/a");
  api::ListAdaptersResponse all;
  ASSERT_TRUE(contexts_->ListAdapters(&list_call, list, &all).ok());
  ASSERT_EQ(all.adapters_size(), 1);
  EXPECT_EQ(all.adapters(0).kind(), api::LORA);
  EXPECT_EQ(all.adapters(0).lora_rank(), 3);
  EXPECT_EQ(all.adapters(0).lora_alpha(), 6);
  EXPECT_GT(all.adapters(0).create_time().seconds(), 0);
  api::GetAdapterRequest get;
  get.set_name("contexts/a");
  get.set_adapter_id("made");
  api::Adapter shown;
  ASSERT_TRUE(contexts_->GetAdapter(&get_call, get, &shown).ok());
  EXPECT_EQ(shown.DebugString(), all.adapters(0).DebugString());

  std::string file;
  int64_t total = 0;
  ASSERT_TRUE(Export("made", &file, "contexts/a", &total).ok());
  EXPECT_EQ(total, static_cast<int64_t>(file.size()));
  CreateReady("b", std::string(500, 'b'));
  for (const size_t piece : {size_t{7}, size_t{100}, file.size()}) {
    api::Adapter adapter;
    const grpc::Status status = Import(Sent(file, piece, "contexts/b"), &adapter);
    ASSERT_TRUE(status.ok()) << status.error_message();
    EXPECT_TRUE(adapter.imported());
    EXPECT_EQ(adapter.lora_rank(), 3);
    EXPECT_EQ(adapter.steps(), shown.steps());
  }
  EXPECT_EQ(Get("b").adapters(0).revision(), 3);
  // Answers of the fake ranks tell revisions apart.
  api::GenerateRequest ask = GenerateRequest("b", "x", 2);
  ask.set_adapter_id("copy");
  EXPECT_EQ(Generate(ask).summary.adapter_revision(), 3);
}

TEST_F(AdapterServiceTest, BadNames) {
  std::string file;
  EXPECT_FAILS(Export("nobody", &file), NOT_FOUND, "ADAPTER_NOT_FOUND");
  EXPECT_FAILS(Export("../made", &file), INVALID_ARGUMENT, "FIELD_OUT_OF_RANGE");
  EXPECT_FAILS(Export("made", &file, "contexts/none"), NOT_FOUND, "CONTEXT_NOT_FOUND");
  const std::string good = Exported();
  EXPECT_FAILS(Import(Sent(good, 100, "contexts/none")), NOT_FOUND, "CONTEXT_NOT_FOUND");
  EXPECT_FAILS(Import(Sent(good, 100, "a")), INVALID_ARGUMENT, "FIELD_OUT_OF_RANGE");
  EXPECT_FAILS(Import(Sent(good, 100, "contexts/a", "A B")), INVALID_ARGUMENT, "FIELD_OUT_OF_RANGE");
  ASSERT_TRUE(Create("fresh", "text").ok());
  EXPECT_FAILS(Import(Sent(good, 100, "contexts/fresh")), FAILED_PRECONDITION, "CONTEXT_NOT_READY");
}

TEST_F(AdapterServiceTest, BadFilesChangeNothing) {
  const std::string good = Exported();
  std::string flipped = good, foreign = good;
  flipped[good.size() - 60] ^= 1;
  EXPECT_FAILS(Import(Sent(flipped, 64)), DATA_LOSS, "CHECKSUM_MISMATCH");
  for (const size_t kept : {size_t{0}, size_t{5}, size_t{12}, size_t{60}, good.size() - 33, good.size() - 1}) {
    EXPECT_FAILS(Import(Sent(good.substr(0, kept), 64)), DATA_LOSS, "ADAPTER_FILE_INVALID");
  }
  EXPECT_FAILS(Import(Sent(good + "x", 64)), INVALID_ARGUMENT, "ADAPTER_FILE_INVALID");
  EXPECT_FAILS(Import(Sent("PK\3\4" + good, 64)), INVALID_ARGUMENT, "ADAPTER_FILE_INVALID");
  EXPECT_FAILS(Import(Sent(std::string(5000, '\xff'), 64)), INVALID_ARGUMENT, "ADAPTER_FILE_INVALID");
  // The fingerprint of another model, in a file that is whole.
  const size_t at = good.find("fake");  // the first field
  ASSERT_NE(at, std::string::npos);
  foreign.replace(at, 4, "fuke");
  EXPECT_FAILS(Import(Sent(Signed(foreign), 64)), INVALID_ARGUMENT, "MODEL_MISMATCH");
  EXPECT_EQ(Get("a").adapters_size(), 1);
  EXPECT_EQ(Exported(), good) << "the adapter that was there";
  Messages allowed = Sent(Signed(foreign), 64);
  allowed[0].mutable_header()->set_allow_other_model(true);
  EXPECT_TRUE(Import(allowed).ok());
}

TEST_F(AdapterServiceTest, BadStreamsChangeNothing) {
  const std::string good = Exported();
  Messages no_header = Sent(good, 100), no_finish = Sent(good, 100), twice = Sent(good, 100), empty = Sent(good, 100);
  no_header.erase(no_header.begin());
  no_finish.pop_back();
  twice.insert(twice.begin() + 1, twice.front());
  empty.insert(empty.begin() + 1, api::ImportAdapterRequest());
  EXPECT_FAILS(Import({}), INVALID_ARGUMENT, "FIELD_OUT_OF_RANGE");
  EXPECT_FAILS(Import(no_header), INVALID_ARGUMENT, "FIELD_OUT_OF_RANGE");
  EXPECT_FAILS(Import(no_finish), INVALID_ARGUMENT, "FIELD_OUT_OF_RANGE");
  EXPECT_FAILS(Import(twice), INVALID_ARGUMENT, "FIELD_OUT_OF_RANGE");
  EXPECT_FAILS(Import(empty), INVALID_ARGUMENT, "FIELD_OUT_OF_RANGE");
  EXPECT_EQ(Get("a").adapters_size(), 1);
}

TEST_F(AdapterServiceTest, AnImportIsAloneOnItsContext) {
  const std::string good = Exported();
  grpc::ClientContext call;
  api::Adapter response;
  const auto writer = contexts_->ImportAdapter(&call, &response);
  const Messages messages = Sent(good, 100);
  for (size_t i = 0; i + 1 < messages.size(); ++i) ASSERT_TRUE(writer->Write(messages[i]));
  WaitFor([&] { return Get("a").state() == api::Context::ADAPTING; });
  EXPECT_FAILS(Adapt(AdaptRequest("a")), ABORTED, "CONTEXT_BUSY");
  EXPECT_FAILS(Import(messages), ABORTED, "CONTEXT_BUSY");
  call.TryCancel();
  writer->Finish();
  WaitFor([&] { return Get("a").state() == api::Context::READY; });
  EXPECT_EQ(Get("a").adapters_size(), 1);
}

class AdapterLossTest : public AdapterServiceTest {
 protected:
  void TearDown() override { ServiceTest::TearDown(); }
};

// A rank dies with a piece on its way: the caller learns the cause, and the context is there to be prefilled again.
TEST_F(AdapterLossTest, ARankDiesDuringExport) {
  workers_[1]->Freeze();
  grpc::Status status;
  std::string file;
  std::thread caller([&] { status = Export("made", &file); });
  WaitFor([&] { return server_->hub().With([](Coordinator& core) { return core.scheduler().in_flight() > 0; }); });
  workers_[1]->Kill();
  caller.join();
  EXPECT_FAILS(status, UNAVAILABLE, "WORKER_LOST");
  EXPECT_EQ(Get("a").state(), api::Context::CREATED);
}

TEST_F(AdapterLossTest, ARankDiesDuringImport) {
  const std::string good = Exported();
  workers_[1]->Freeze();
  grpc::Status status;
  std::thread caller([&] { status = Import(Sent(good, 100)); });
  WaitFor([&] { return server_->hub().With([](Coordinator& core) { return core.scheduler().in_flight() > 0; }); });
  workers_[1]->Kill();
  caller.join();
  EXPECT_FAILS(status, UNAVAILABLE, "WORKER_LOST");
  EXPECT_EQ(Get("a").state(), api::Context::CREATED);
  EXPECT_EQ(Get("a").adapters_size(), 0);
}

TEST_F(AdapterServiceTest, AdapterSettingsOutOfRange) {
  const std::vector<std::function<void(api::AdaptContextRequest&)>> bad = {
      [](auto& r) { r.set_kind(static_cast<api::AdapterKind>(77)); }, [](auto& r) { r.set_lora_rank(0); },
      [](auto& r) { r.set_lora_rank(1 << 20); },
      [](auto& r) { r.set_lora_alpha(std::numeric_limits<double>::infinity()); },
      [](auto& r) { r.set_optimizer(static_cast<api::Optimizer>(-1)); }, [](auto& r) { r.set_momentum(0.5); },
      [](auto& r) { r.set_schedule(static_cast<api::Schedule>(99)); },
      [](auto& r) { r.set_warmup_steps(std::numeric_limits<int64_t>::max()); },
      [](auto& r) { r.set_max_seconds(-3); }, [](auto& r) { r.set_base_adapter("UPPER"); }};
  for (const auto& set : bad) {
    api::AdaptContextRequest request = AdaptRequest("a");
    set(request);
    EXPECT_FAILS(Adapt(request), INVALID_ARGUMENT, "FIELD_OUT_OF_RANGE");
  }
  api::AdaptContextRequest request = AdaptRequest("a");
  request.set_base_adapter("nobody");
  EXPECT_FAILS(Adapt(request), NOT_FOUND, "ADAPTER_NOT_FOUND");
}

}  // namespace
}  // namespace refocus
