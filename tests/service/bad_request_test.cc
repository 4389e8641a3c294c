// Bad adaptations, generations and scores: the status that is promised, and nobody else notices.
#include <cmath>
#include <limits>

#include "base/limits.h"
#include "tests/service/service_fixture.h"

namespace refocus {
namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kDenormal = 4e-320;

class BadRequestTest : public ServiceTest {
 protected:
  void SetUp() override {
    StartServer();
    StartGroup(2);
    CreateReady("a", std::string(600, 'x'));
  }
  void TearDown() override {
    EXPECT_EQ(Get("a").adapters_size(), 0);
    ExpectUnharmed();
    ServiceTest::TearDown();
  }
  // Each setter spoils one field of an otherwise good request.
  template <typename... Setters>
  void ExpectBadAdapt(Setters... setters) {
    (
        [&] {
          api::AdaptContextRequest request = AdaptRequest("a");
          setters(request);
          const grpc::Status status = Adapt(request);
          EXPECT_FAILS(status, INVALID_ARGUMENT, "FIELD_OUT_OF_RANGE");
          EXPECT_FALSE(FailureOf(status).metadata["allowed"].empty()) << status.error_message();
        }(),
        ...);
  }
  template <typename... Setters>
  void ExpectBadGenerate(Setters... setters) {
    (
        [&] {
          api::GenerateRequest request = GenerateRequest("a", "x", 4);
          setters(request);
          EXPECT_FAILS(Generate(request).status, INVALID_ARGUMENT, "FIELD_OUT_OF_RANGE");
        }(),
        ...);
  }
  static api::ScoreRequest ScoreRequest(const std::string& prompt, const std::string& target) {
    api::ScoreRequest request;
    request.set_name("contexts/a");
    request.mutable_prompt()->set_text(prompt);
    request.mutable_target()->set_text(target);
    return request;
  }
};

TEST_F(BadRequestTest, Row65Steps) {
  ExpectBadAdapt([](auto& r) { r.set_steps(0); }, [](auto& r) { r.set_steps(-1); },
                 [](auto& r) { r.set_steps(1'000'000'000); });
}

TEST_F(BadRequestTest, Row66LearningRate) {
  ExpectBadAdapt([](auto& r) { r.set_learning_rate(kNan); }, [](auto& r) { r.set_learning_rate(kInf); },
                 [](auto& r) { r.set_learning_rate(-1); }, [](auto& r) { r.set_learning_rate(1e38); },
                 [](auto& r) { r.set_learning_rate(kDenormal); });
}

TEST_F(BadRequestTest, Row67ClipBetaDecay) {
  ExpectBadAdapt([](auto& r) { r.set_clip_norm(0); }, [](auto& r) { r.set_clip_norm(kNan); },
                 [](auto& r) { r.set_beta1(1.0); }, [](auto& r) { r.set_beta2(1.0); },
                 [](auto& r) { r.set_beta2(0.99999999999); }, [](auto& r) { r.set_weight_decay(kNan); },
                 [](auto& r) { r.set_epsilon(0); }, [](auto& r) { r.set_epsilon(kDenormal); },
                 [](auto& r) { r.set_max_probe_rise(kNan); }, [](auto& r) { r.set_max_probe_rise(-0.1); });
}

TEST_F(BadRequestTest, Row68Spans) {
  const auto span = [](int64_t start, int64_t length) {
    return [=](api::AdaptContextRequest& r) {
      auto* s = r.mutable_explicit_spans()->add_spans();
      s->set_start(start);
      s->set_length(length);
    };
  };
  ExpectBadAdapt([](auto& r) { r.set_span_tokens(0); }, [](auto& r) { r.set_span_tokens(kMaxSpanTokens + 1); },
                 [](auto& r) { r.set_spans_per_step(0); }, [](auto& r) { r.set_spans_per_step(kMaxSpansPerStep + 1); },
                 [](auto& r) { r.mutable_explicit_spans(); }, [](auto& r) { r.set_probe_spans(-1); },
                 [](auto& r) { r.set_probe_spans(kMaxProbeSpans + 1); });
  ExpectBadAdapt(span(0, 0), span(0, 600), span(599, 1), span(-1, 3), span(590, 10), span(0, -5),
                 span(std::numeric_limits<int64_t>::max(), 1), span(1, std::numeric_limits<int64_t>::max()));
}

TEST_F(BadRequestTest, Row70BeforePrefill) {
  ASSERT_TRUE(Create("fresh", "text").ok());
  EXPECT_FAILS(Adapt(AdaptRequest("fresh")), FAILED_PRECONDITION, "CONTEXT_NOT_READY");
  EXPECT_FAILS(Generate(GenerateRequest("fresh", "x", 1)).status, FAILED_PRECONDITION, "CONTEXT_NOT_READY");
}

TEST_F(BadRequestTest, OneTokenHasNothingToPredict) {
  CreateReady("one", "x");
  EXPECT_FAILS(Adapt(AdaptRequest("one")), FAILED_PRECONDITION, "CONTEXT_TOO_SHORT");
  EXPECT_EQ(Generate(GenerateRequest("one", "", 2)).text, "yz");
}

TEST_F(BadRequestTest, Row72AdapterOfAnotherContext) {
  CreateReady("b", std::string(500, 'b'));
  api::AdaptContextRequest request = AdaptRequest("b");
  request.set_adapter_id("of-b");
  ASSERT_TRUE(Adapt(request).ok());
  api::GenerateRequest generate = GenerateRequest("a", "x", 2);
  generate.set_adapter_id("of-b");
  EXPECT_FAILS(Generate(generate).status, NOT_FOUND, "ADAPTER_NOT_FOUND");
  api::AdaptContextRequest more = AdaptRequest("a");
  more.set_adapter_id("of-b");
  more.set_continue_adapter(true);
  EXPECT_FAILS(Adapt(more), NOT_FOUND, "ADAPTER_NOT_FOUND");
}

TEST_F(BadRequestTest, Row73UnknownEnum) {
  ExpectBadAdapt([](auto& r) { r.set_on_disconnect(static_cast<api::OnDisconnect>(77)); });
}

TEST_F(BadRequestTest, BadIds) {
  ExpectBadAdapt([](auto& r) { r.set_adapter_id("../x"); }, [](auto& r) { r.set_request_id("new\nline"); });
}

TEST_F(BadRequestTest, ValidateOnlyChangesNothing) {
  api::AdaptContextRequest request = AdaptRequest("a");
  request.set_validate_only(true);
  request.clear_steps();
  std::vector<api::AdaptEvent> events;
  ASSERT_TRUE(Adapt(request, &events).ok());
  ASSERT_EQ(events.size(), 1u);
  EXPECT_EQ(events[0].effective().steps(), 32);
  EXPECT_EQ(events[0].effective().probe_spans(), 2);
}

TEST_F(BadRequestTest, Row75Temperature) {
  ExpectBadGenerate([](auto& r) { r.set_temperature(kNan); }, [](auto& r) { r.set_temperature(kInf); },
                    [](auto& r) { r.set_temperature(-1); }, [](auto& r) { r.set_temperature(1e-40); },
                    [](auto& r) { r.set_temperature(101); });
}

TEST_F(BadRequestTest, Row75Filters) {
  ExpectBadGenerate([](auto& r) { r.set_top_p(0); }, [](auto& r) { r.set_top_p(1.5); },
                    [](auto& r) { r.set_top_p(kNan); }, [](auto& r) { r.set_top_p(-0.5); },
                    [](auto& r) { r.set_min_p(1.01); }, [](auto& r) { r.set_min_p(-0.1); },
                    [](auto& r) { r.set_min_p(kNan); });
}

TEST_F(BadRequestTest, Row75Penalties) {
  ExpectBadGenerate([](auto& r) { r.set_repetition_penalty(0); }, [](auto& r) { r.set_repetition_penalty(kNan); },
                    [](auto& r) { r.set_repetition_penalty(-1); }, [](auto& r) { r.set_repetition_penalty(kInf); },
                    [](auto& r) { r.set_presence_penalty(kNan); }, [](auto& r) { r.set_presence_penalty(kInf); },
                    [](auto& r) { r.set_frequency_penalty(kNan); }, [](auto& r) { r.set_frequency_penalty(-11); });
}

TEST_F(BadRequestTest, Row76TopK) {
  ExpectBadGenerate([](auto& r) { r.set_top_k(-1); }, [](auto& r) { r.set_top_k(INT32_MIN); },
                    [](auto& r) { r.set_top_k(kMaxTopK + 1); });
  api::GenerateRequest request = GenerateRequest("a", "x", 2);
  request.set_top_k(kMaxTopK);
  const Answer answer = Generate(request);
  ASSERT_TRUE(answer.status.ok());
  EXPECT_EQ(answer.events.back().summary().top_k(), FakeModel(kWindow).vocab) << "cut to the vocabulary";
}

TEST_F(BadRequestTest, Row77Samples) {
  const auto n = [](int32_t samples, double temperature) {
    return [=](auto& r) {
      r.set_n(samples);
      r.set_temperature(temperature);
    };
  };
  ExpectBadGenerate(n(0, 1), n(-1, 1), n(65, 1), n(1'000'000, 1), n(2, 0));
}

TEST_F(BadRequestTest, Row78MinTokens) {
  ExpectBadGenerate([](auto& r) { r.set_min_tokens(-1); }, [](auto& r) { r.set_min_tokens(1'000'000); },
                    [](auto& r) { r.set_max_tokens(5), r.set_min_tokens(6); });
}

TEST_F(BadRequestTest, Row79LogitBias) {
  const auto bias = [](uint32_t id, double value) {
    return [=](api::GenerateRequest& r) { (*r.mutable_logit_bias())[id] = static_cast<float>(value); };
  };
  ExpectBadGenerate(bias(1, kNan), bias(1, kInf), bias(1, -2000), [](auto& r) {
    for (uint32_t id = 0; id <= kMaxLogitBias; ++id) (*r.mutable_logit_bias())[id] = 1;
  });
  for (const uint32_t id : {static_cast<uint32_t>(FakeModel(kWindow).vocab), UINT32_MAX}) {
    api::GenerateRequest request = GenerateRequest("a", "x", 4);
    bias(id, 1)(request);
    EXPECT_FAILS(Generate(request).status, INVALID_ARGUMENT, "TOKEN_ID_OUT_OF_RANGE");
  }
}

TEST_F(BadRequestTest, Row77Logprobs) {
  ExpectBadGenerate([](auto& r) { r.set_logprobs(-1); }, [](auto& r) { r.set_logprobs(21); },
                    [](auto& r) { r.set_logprobs(300); });
  api::GenerateRequest request = GenerateRequest("a", "a", 2);
  request.set_logprobs(20);
  const Answer answer = Generate(request);
  ASSERT_TRUE(answer.status.ok());
  EXPECT_EQ(answer.events[0].logprobs(0).top_size(), 20);
}

TEST_F(BadRequestTest, Row78MaxTokens) {
  ExpectBadGenerate([](auto& r) { r.set_max_tokens(0); }, [](auto& r) { r.set_max_tokens(-1); },
                    [](auto& r) { r.set_max_tokens(0xffffffffll); },
                    [](auto& r) { r.set_max_tokens(std::numeric_limits<int64_t>::max()); });
  const grpc::Status status = Generate(GenerateRequest("a", "xyz", kWindow - 600)).status;
  EXPECT_FAILS(status, INVALID_ARGUMENT, "CONTEXT_TOO_LONG");
  auto metadata = FailureOf(status).metadata;
  EXPECT_EQ(metadata["context_tokens"], "600");
  EXPECT_EQ(metadata["prompt_tokens"], "3");
  EXPECT_EQ(metadata["answer_tokens"], std::to_string(kWindow - 600));
  EXPECT_EQ(metadata["limit"], std::to_string(kWindow));
}

TEST_F(BadRequestTest, Row80StopStrings) {
  ExpectBadGenerate(
      [](auto& r) {
        for (int i = 0; i < 10'000; ++i) r.add_stop("s");
      },
      [](auto& r) { r.add_stop(""); }, [](auto& r) { r.add_stop(std::string(1'000'000, 's')); },
      [](auto& r) {
        for (int i = 0; i < 65; ++i) r.add_stop_token_ids(1);
      });
  api::GenerateRequest request = GenerateRequest("a", "x", 4);
  request.add_stop_token_ids(300);
  EXPECT_FAILS(Generate(request).status, INVALID_ARGUMENT, "TOKEN_ID_OUT_OF_RANGE");
}

TEST_F(BadRequestTest, Row82Row83Score) {
  EXPECT_FAILS(Score({ScoreRequest("p", "")}), INVALID_ARGUMENT, "FIELD_OUT_OF_RANGE");
  EXPECT_FAILS(Score({api::ScoreRequest()}), INVALID_ARGUMENT, "FIELD_OUT_OF_RANGE");
  EXPECT_FAILS(Score({ScoreRequest("p", std::string(kWindow, 't'))}), INVALID_ARGUMENT, "CONTEXT_TOO_LONG");
  api::ScoreRequest ids = ScoreRequest("p", "");
  ids.mutable_target()->mutable_ids()->add_ids(0x80000001u);
  EXPECT_FAILS(Score({ids}), INVALID_ARGUMENT, "TOKEN_ID_OUT_OF_RANGE");
  // Targets before the bad one are answered.
  std::vector<api::ScoreEvent> events;
  EXPECT_FAILS(Score({ScoreRequest("p", "q"), ScoreRequest("", "q"), ids, ScoreRequest("p", "q")}, &events),
               INVALID_ARGUMENT, "TOKEN_ID_OUT_OF_RANGE");
  EXPECT_EQ(events.size(), 2u);
}

TEST_F(BadRequestTest, Row84ManyTargets) {
  std::vector<api::ScoreRequest> requests(3000, ScoreRequest("p", "q"));
  std::vector<api::ScoreEvent> events;
  EXPECT_TRUE(Score(requests, &events).ok());
  EXPECT_EQ(events.size(), 3000u);
}

TEST_F(BadRequestTest, BadPrompts) {
  EXPECT_FAILS(Generate([] {
                 api::GenerateRequest r = GenerateRequest("a", "", 2);
                 r.mutable_prompt()->mutable_ids()->add_ids(300);
                 return r;
               }())
                   .status,
               INVALID_ARGUMENT, "TOKEN_ID_OUT_OF_RANGE");
}

TEST_F(BadRequestTest, TextThatIsNoUtf8) {
  EXPECT_FAILS(Generate(GenerateRequest("a", "ab\xff", 2)).status, INVALID_ARGUMENT, "INVALID_UTF8");
  EXPECT_FAILS(Score({ScoreRequest("p", "q\xff")}), INVALID_ARGUMENT, "INVALID_UTF8");
  EXPECT_FAILS(Score({ScoreRequest("\xff", "q")}), INVALID_ARGUMENT, "INVALID_UTF8");
  grpc::ClientContext call;
  api::TokenizeRequest request;
  request.set_text("a\xff");
  api::TokenizeResponse response;
  const grpc::Status status = inference_->Tokenize(&call, request, &response);
  EXPECT_FAILS(status, INVALID_ARGUMENT, "INVALID_UTF8");
  EXPECT_NE(status.error_message().find("byte 1"), std::string::npos);
}

TEST_F(BadRequestTest, Detokenize) {
  grpc::ClientContext call, second;
  api::DetokenizeRequest request;
  api::DetokenizeResponse response;
  for (const uint32_t id : {0x61u, 0xc3u, 0xa9u, 0xffu, 258u}) request.add_ids(id);
  ASSERT_TRUE(inference_->Detokenize(&call, request, &response).ok());
  EXPECT_EQ(response.text(), "a\xc3\xa9\xef\xbf\xbd<|im_start|>");
  request.add_ids(4'000'000'000u);
  EXPECT_FAILS(inference_->Detokenize(&second, request, &response), INVALID_ARGUMENT, "TOKEN_ID_OUT_OF_RANGE");
}

TEST_F(BadRequestTest, StopStringsEndTheAnswer) {
  api::GenerateRequest request = GenerateRequest("a", "a", 50);
  request.add_stop("efg");
  const Answer answer = Generate(request);
  ASSERT_TRUE(answer.status.ok());
  EXPECT_EQ(answer.text, "bcd");
  EXPECT_EQ(answer.summary.finish_reason(), api::FINISH_STOP);
  EXPECT_EQ(answer.summary.stop(), "efg");
  request.clear_stop();
  request.add_stop_token_ids('h');
  const Answer by_id = Generate(request);
  EXPECT_EQ(by_id.text, "bcdefg");
  EXPECT_EQ(by_id.summary.finish_reason(), api::FINISH_STOP);
}

}  // namespace
}  // namespace refocus
