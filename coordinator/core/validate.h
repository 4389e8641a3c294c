// Everything a request says is checked here, before anything is allocated or sent: each function refuses with
// INVALID_ARGUMENT that names field, value and limit, or returns what to do with every default filled in. Pure.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "base/model_config.h"
#include "base/status.h"
#include "coordinator/chat_format.h"
#include "coordinator/core/adapt.h"
#include "coordinator/core/generate.h"
#include "coordinator/core/messages.h"
#include "coordinator/core/probe.h"
#include "coordinator/tokenizer.h"

namespace refocus {

// "contexts/{id}", id as in CreateContextRequest.
Status CheckContextName(const std::string& name);
Status CheckContextId(const std::string& id);
Status CheckAdapterId(const std::string& id);  // 1 to 63 of [a-z0-9-]
Status CheckRequestId(const std::string& id);  // may be empty
Status CheckOnDisconnect(int value);           // an enum value that this build does not know is refused
Status CheckHeader(const api::CreateContextRequest::Header& header);
double TtlSeconds(const api::CreateContextRequest::Header& header, double default_seconds);

// fixed32 on the wire, int32 inside. TOKEN_ID_OUT_OF_RANGE with index and value.
StatusOr<std::vector<int32_t>> CheckIds(const google::protobuf::RepeatedField<uint32_t>& ids, int64_t vocab,
                                        int64_t first_index);

// Text is tokenized: FAILED_PRECONDITION NO_TOKENIZER when `tokenizer` is null. Unset content: no tokens.
StatusOr<std::vector<int32_t>> PromptIds(const char* field, const api::Prompt& prompt, const ModelConfig& model,
                                         const Tokenizer* tokenizer);

// Without its texts' tokens, which ChatFormat makes.
ChatFormat::Opening OpeningOf(const api::CreateContextRequest::Header& header);
StatusOr<ChatFormat::Asked> ChatIds(const api::Chat& chat, const ModelConfig& model, const ChatFormat& format);
// The prompt of a request, or its question in a conversation. As PromptIds; NO_CHAT_FORMAT, NO_THINKING.
template <typename Request>
StatusOr<ChatFormat::Asked> QuestionIds(const Request& request, const ModelConfig& model, const Tokenizer* tokenizer,
                                        const ChatFormat& format) {
  if (request.has_chat() && request.has_prompt()) return FieldError("chat", "prompt as well", "one of the two");
  if (request.has_chat()) return ChatIds(request.chat(), model, format);
  REFOCUS_ASSIGN_OR_RETURN(auto ids, PromptIds("prompt", request.prompt(), model, tokenizer));
  return ChatFormat::Asked{std::move(ids), nullptr};
}

// INVALID_ARGUMENT CONTEXT_TOO_LONG when context + prompt + answer exceed the model's window.
Status CheckWindow(int64_t context, int64_t prompt, int64_t answer, int64_t window);

// The request's, or the default one.
std::string AdapterIdOf(const api::AdaptContextRequest& request);

// Fills effective, probes and explicit_spans, recall_rows or candidates; `seed` is used when the request has none.
// `start`: the adapter whose delta the request wants to start from, as far as there is one; else null. `found`: the rows
// that a plan without them has asked for, or null; they are moved from.
StatusOr<AdaptPlan> PlanAdapt(const api::AdaptContextRequest& request, const ModelConfig& model,
                              const api::Adapter* start, int64_t token_count, uint64_t seed,
                              HeldOutRows* found = nullptr);

// Everything but the sequence.
StatusOr<GeneratePlan> PlanGenerate(const api::GenerateRequest& request, const ModelConfig& model,
                                    const Tokenizer* tokenizer, uint64_t seed);

// Everything but the sequence. `token_count` of the context; the prompt's is behind it.
StatusOr<ProbePlan> PlanProbe(const api::ProbeAttentionRequest& request, const ModelConfig& model, int64_t token_count,
                              int64_t prompt_tokens);

}  // namespace refocus
