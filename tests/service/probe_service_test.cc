// ProbeAttention over real streams: what comes back in which shape, and every bad request.
#include <functional>
#include <limits>
#include <map>
#include <utility>

#include "base/limits.h"
#include "tests/service/service_fixture.h"

namespace refocus {
namespace {

constexpr int64_t kTokens = 1500;

class ProbeServiceTest : public ServiceTest {
 protected:
  void SetUp() override {
    StartServer();
    StartGroup(2);
    CreateReady("a", std::string(kTokens, 'x'));
  }
  void TearDown() override {
    ExpectUnharmed();
    ServiceTest::TearDown();
  }

  static api::ProbeAttentionRequest Request(const std::string& prompt = "") {
    api::ProbeAttentionRequest request;
    request.set_name("contexts/a");
    request.mutable_prompt()->set_text(prompt);
    for (const auto& [begin, end] : std::vector<std::pair<int64_t, int64_t>>{{0, kTokens}, {512, 100 + 512}, {7, 7}}) {
      api::ProbeAttentionRequest::KeyRange* range = request.add_ranges();
      range->set_begin(begin);
      range->set_end(end);
    }
    return request;
  }

  grpc::Status Probe(const api::ProbeAttentionRequest& request) {
    grpc::ClientContext call;
    const auto stream = inference_->ProbeAttention(&call, request);
    events_.clear();
    summary_.Clear();
    masses_.clear();
    api::ProbeAttentionEvent event;
    while (stream->Read(&event)) {
      EXPECT_LE(event.ByteSizeLong(), size_t{1} << 20);
      if (event.has_summary()) summary_ = event.summary();
      events_.push_back(event);
      int at = 0;
      for (int64_t row = 0; row < event.row_count(); ++row) {
        const int64_t pos = event.positions().empty() ? -1 : event.positions(static_cast<int>(row));
        std::vector<float>& to = masses_[{event.layer(), pos}];
        EXPECT_TRUE(to.empty()) << "a row came twice";
        for (int i = 0; i < event.mass_size() / event.row_count(); ++i) to.push_back(event.mass(at++));
      }
    }
    return stream->Finish();
  }

  // What the fake ranks say of one row: [ranges, heads].
  static std::vector<float> Expected(const api::ProbeAttentionRequest& request, int32_t layer, int64_t pos,
                                     std::vector<int32_t> heads = {0, 1}, int64_t revision = 0) {
    std::vector<float> masses;
    for (const auto& range : request.ranges()) {
      for (const int32_t head : heads) {
        masses.push_back(FakeMass(layer, pos, range.begin(), range.end(), head, revision));
      }
    }
    return masses;
  }

  template <typename... Changes>
  void ExpectBad(Changes... changes) {
    (
        [&] {
          api::ProbeAttentionRequest request = Request("pq");
          changes(request);
          const grpc::Status status = Probe(request);
          EXPECT_FAILS(status, INVALID_ARGUMENT, "FIELD_OUT_OF_RANGE");
          EXPECT_FALSE(FailureOf(status).metadata["allowed"].empty()) << status.error_message();
          EXPECT_TRUE(events_.empty());
        }(),
        ...);
  }

  std::vector<api::ProbeAttentionEvent> events_;
  api::ProbeAttentionSummary summary_;
  std::map<std::pair<int32_t, int64_t>, std::vector<float>> masses_;  // by layer and position
};

TEST_F(ProbeServiceTest, RowsOfThePrompt) {
  const api::ProbeAttentionRequest request = Request("pqr");
  ASSERT_TRUE(Probe(request).ok());
  ASSERT_EQ(masses_.size(), 6u);
  for (const int32_t layer : {0, 1}) {
    for (const int64_t pos : {kTokens, kTokens + 1, kTokens + 2}) {
      EXPECT_EQ((masses_[{layer, pos}]), Expected(request, layer, pos));
    }
  }
  EXPECT_EQ(summary_.context_tokens(), kTokens);
  EXPECT_EQ(summary_.prompt_tokens(), 3);
  EXPECT_EQ(summary_.rows(), 3);
  EXPECT_EQ(summary_.layers_size(), 2);
  EXPECT_EQ(summary_.heads_size(), 2);
  EXPECT_EQ(summary_.adapter_revision(), 0);
  EXPECT_TRUE(events_.back().mass().empty());
}

TEST_F(ProbeServiceTest, WithoutAPromptTheLastToken) {
  ASSERT_TRUE(Probe(Request()).ok());
  EXPECT_EQ(masses_.size(), 2u);
  EXPECT_EQ((masses_[{1, kTokens - 1}]), Expected(Request(), 1, kTokens - 1));
}

TEST_F(ProbeServiceTest, ChosenRowsLayersAndHeads) {
  api::ProbeAttentionRequest request = Request("pqr");
  for (const int64_t pos : {kTokens + 2, int64_t{5}, kTokens, int64_t{0}}) request.add_positions(pos);
  request.add_layers(1);
  request.add_heads(1);
  ASSERT_TRUE(Probe(request).ok());
  EXPECT_EQ(masses_.size(), 4u);
  for (const int64_t pos : {int64_t{0}, int64_t{5}, kTokens, kTokens + 2}) {
    EXPECT_EQ((masses_[{1, pos}]), Expected(request, 1, pos, {1}));
  }
}

TEST_F(ProbeServiceTest, Means) {
  api::ProbeAttentionRequest request = Request("pqr");
  for (const int64_t pos : {int64_t{0}, kTokens - 1, kTokens + 2}) request.add_positions(pos);
  request.set_mean_over_heads(true);
  ASSERT_TRUE(Probe(request).ok());
  EXPECT_EQ(masses_.size(), 6u);
  const std::vector<float> both = Expected(request, 1, kTokens + 2);
  ASSERT_EQ((masses_[{1, kTokens + 2}].size()), 3u);
  EXPECT_FLOAT_EQ((masses_[{1, kTokens + 2}][1]), (both[2] + both[3]) / 2);

  request.set_mean_over_rows(true);
  ASSERT_TRUE(Probe(request).ok());
  EXPECT_EQ(masses_.size(), 2u);
  double sum = 0;
  for (const int64_t pos : request.positions()) {
    for (const int32_t head : {0, 1}) sum += FakeMass(1, pos, 512, 612, head, 0);
  }
  EXPECT_FLOAT_EQ((masses_[{1, -1}][1]), static_cast<float>(sum / 6));

  request.set_mean_over_heads(false);
  ASSERT_TRUE(Probe(request).ok());
  ASSERT_EQ((masses_[{0, -1}].size()), 6u);
  EXPECT_EQ(events_.size(), 3u);
}

// Several commands, several events a layer: everything arrives once.
TEST_F(ProbeServiceTest, ManyRowsAndRanges) {
  api::ProbeAttentionRequest request = Request(std::string(kMaxProbePromptTokens, 'p'));
  for (int64_t pos = 0; pos < kTokens + kMaxProbePromptTokens; ++pos) request.add_positions(pos);
  while (request.ranges_size() < kMaxKeyRanges) *request.add_ranges() = request.ranges(request.ranges_size() % 3);
  ASSERT_TRUE(Probe(request).ok());
  ASSERT_EQ(masses_.size(), 2u * static_cast<size_t>(request.positions_size()));
  for (const int64_t pos : {int64_t{0}, int64_t{700}, kTokens - 1, kTokens, kTokens + kMaxProbePromptTokens - 1}) {
    EXPECT_EQ((masses_[{0, pos}]), Expected(request, 0, pos)) << pos;
  }
  EXPECT_EQ(summary_.rows(), request.positions_size());
}

TEST_F(ProbeServiceTest, AdaptedQueries) {
  ASSERT_TRUE(Adapt(AdaptRequest("a")).ok());
  api::ProbeAttentionRequest request = Request("p");
  request.set_adapter_id("default");
  ASSERT_TRUE(Probe(request).ok());
  EXPECT_EQ((masses_[{1, kTokens}]), Expected(request, 1, kTokens, {0, 1}, 1));
  EXPECT_EQ(summary_.adapter_revision(), 1);
  request.set_adapter_id("other");
  EXPECT_FAILS(Probe(request), NOT_FOUND, "ADAPTER_NOT_FOUND");
}

TEST_F(ProbeServiceTest, BadRequests) {
  const auto range = [](int64_t begin, int64_t end) {
    return [=](api::ProbeAttentionRequest& r) {
      r.add_ranges()->set_begin(begin);
      r.mutable_ranges()->rbegin()->set_end(end);
    };
  };
  ExpectBad([](auto& r) { r.clear_ranges(); }, [](auto& r) { r.set_name("a"); }, range(-1, 5), range(6, 5),
            range(0, kTokens + 1), range(kTokens + 1, kTokens + 1), range(0, std::numeric_limits<int64_t>::max()));
  ExpectBad([](auto& r) { for (int i = 0; i < kMaxKeyRanges; ++i) r.add_ranges(); });
  ExpectBad([](auto& r) { r.add_positions(-1); }, [](auto& r) { r.add_positions(kTokens + 2); },
            [](auto& r) {
              r.add_positions(3);
              r.add_positions(3);
            },
            [](auto& r) { for (int i = 0; i <= kMaxProbeRows; ++i) r.add_positions(i); });
  ExpectBad([](auto& r) { r.add_layers(2); }, [](auto& r) { r.add_layers(-1); },
            [](auto& r) {
              r.add_layers(1);
              r.add_layers(1);
            },
            [](auto& r) { r.add_heads(2); }, [](auto& r) { r.add_heads(std::numeric_limits<int32_t>::min()); });
  ExpectBad([](auto& r) { r.mutable_prompt()->set_text(std::string(kMaxProbePromptTokens + 1, 'p')); });
  api::ProbeAttentionRequest request = Request("p\xff");
  EXPECT_FAILS(Probe(request), INVALID_ARGUMENT, "INVALID_UTF8");
  request = Request();
  request.mutable_prompt()->mutable_ids()->add_ids(300);
  EXPECT_FAILS(Probe(request), INVALID_ARGUMENT, "TOKEN_ID_OUT_OF_RANGE");
  request = Request();
  request.set_name("contexts/none");
  EXPECT_FAILS(Probe(request), NOT_FOUND, "CONTEXT_NOT_FOUND");
  ASSERT_TRUE(Create("fresh", "text").ok());
  request.set_name("contexts/fresh");
  request.clear_ranges();
  request.add_ranges()->set_end(4);
  EXPECT_FAILS(Probe(request), FAILED_PRECONDITION, "CONTEXT_NOT_READY");
}

TEST_F(ProbeServiceTest, MassesThatRanksDoNotSend) {
  StartServer();
  StartGroup(1, [](FakeRank& rank) {
    rank.tamper = [](const wire::Command& command, wire::Result& result) {
      if (command.has_probe_attention()) result.mutable_masses()->RemoveLast();
    };
  });
  CreateReady("a", std::string(kTokens, 'x'));
  EXPECT_FAILS(Probe(Request("p")), INTERNAL, "RANK_DIVERGENCE");
}

}  // namespace
}  // namespace refocus
