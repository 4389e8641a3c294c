// Every limit of the service, in one place. Admission compares with these before anything is allocated.
#pragma once

#include <cstdint>

namespace refocus {

inline constexpr char kProtocolVersion[] = "1";

// gRPC: the library's receive default is 4 MiB; a million ids do not fit one message, so uploads and scores stream.
inline constexpr int kPublicMessageBytes = 1 << 20;
inline constexpr int kWorkerMessageBytes = 4 << 20;
inline constexpr int kUploadChunkBytes = 512 << 10;   // what our client sends
inline constexpr int64_t kMaxUploadChunks = 2'000'000;
inline constexpr int64_t kUploadStallSeconds = 120;

inline constexpr int64_t kMaxContextTokens = int64_t{1} << 24;
inline constexpr int64_t kMaxTextBytes = int64_t{256} << 20;
inline constexpr int64_t kMaxContexts = 4096;
inline constexpr int64_t kMaxAdaptersPerContext = 16;
inline constexpr int64_t kMaxQueuedJobs = 256;
inline constexpr int64_t kMaxDecodeRows = 64;     // sequences that decode in one batch
inline constexpr int64_t kMaxContextExtents = 4;  // a context's own tokens and the prefixes it shares, one behind the other
inline constexpr int64_t kMinSharedTokens = 1024;  // contexts that begin alike for fewer tokens share nothing
inline constexpr int64_t kMaxTailExtents = 4;     // a request's own rows and the prompts it forked from

inline constexpr int64_t kMaxAdaptSteps = 10'000;
inline constexpr int64_t kMaxSpanTokens = 8192;
inline constexpr int64_t kMaxBehindRows = 512;      // of a span that is read again behind the context
inline constexpr int64_t kMaxBehind = int64_t{1} << 20;  // tokens behind the context that such spans are spread over
inline constexpr int64_t kMaxSpansPerStep = 64;
inline constexpr int64_t kMaxStepRows = 65'536;       // spans_per_step x span_tokens
inline constexpr int64_t kMaxProbeSpans = 16;
inline constexpr int64_t kMaxExplicitSpans = 65'536;
inline constexpr int64_t kMaxCandidateSpans = 4096;
inline constexpr int64_t kMaxLoraRank = 512;
inline constexpr int64_t kLoraByDefaultParameters = 14'000'000'000;  // above, a full delta with moments takes tens of GB
inline constexpr int64_t kDeltaPieceNumbers = 128 << 10;  // of an adapter's numbers on their way in or out
inline constexpr int64_t kMaxAdapterHeaderBytes = 64 << 10;
inline constexpr int64_t kMaxGeneratedTokens = 65'536;
inline constexpr int32_t kMaxTopLogprobs = 20;
inline constexpr int64_t kMaxStops = 16;
inline constexpr int64_t kMaxProbeRows = 4096;
inline constexpr int64_t kMaxProbePromptTokens = 1024;     // one command: they attend to each other
inline constexpr int64_t kMaxKeyRanges = 64;
inline constexpr int64_t kMaxProbeValues = int64_t{1} << 22;  // rows x ranges x layers x heads
inline constexpr int64_t kProbeValuesAtOnce = 128 << 10;    // in a message
inline constexpr int64_t kMaxStopBytes = 256;
inline constexpr int64_t kMaxStopTokenIds = 64;
inline constexpr int64_t kMaxLogitBias = 1024;
inline constexpr int32_t kMaxTopK = 1 << 20;
inline constexpr int64_t kMaxPromptLogprobs = 65'536;
inline constexpr int32_t kMaxSamples = 64;            // of one request
inline constexpr int64_t kMaxExchanges = 1024;        // earlier ones of a conversation
inline constexpr int64_t kMaxThinkingTokens = 65'536;

// One prefill or extend command: rows, and the time it should take (its length follows from measured times).
inline constexpr int64_t kMaxChunkRows = 16'384;
inline constexpr double kChunkSeconds = 0.5;
inline constexpr double kShortPromptSeconds = 0.25;  // prompts that take longer wait for their turn as chunks do

static_assert(kWorkerMessageBytes > kMaxChunkRows * 4 * 2, "a chunk's ids fit one message");
static_assert(kWorkerMessageBytes > kDeltaPieceNumbers * 4 * 2, "a piece of a delta fits one message");
static_assert(kWorkerMessageBytes > kMaxSpansPerStep * (kMaxSpanTokens + 1) * 4, "a step's ids fit one message");

}  // namespace refocus
