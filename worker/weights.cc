#include "worker/weights.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <exception>
#include <map>
#include <mutex>
#include <set>
#include <thread>
#include <utility>

#include <ATen/ops/empty.h>
#include <c10/util/BFloat16.h>

#include "base/check.h"
#include "base/gguf.h"
#include "base/input_file.h"
#include "base/log.h"
#include "base/safetensors.h"
#include "worker/hash.h"
#include "worker/random_weights.h"
#include "worker/uplink.h"

namespace refocus {
namespace {

// What a thread takes at once, as it is in the file and as fp32 (one row or rotary head, where that is more).
constexpr int64_t kStageBytes = 4 << 20;
constexpr int64_t kPieceElements = 4096;  // decoded at once on the way to bf16; whole blocks of every type

Status Invalid(const std::string& path, const std::string& tensor, const std::string& got,
               const std::string& expected) {
  return Error(StatusCode::kInvalidArgument, "WEIGHTS_INVALID",
               path + ": tensor " + Quoted(tensor) + ": got " + got + ", expected " + expected,
               {{"file", path}, {"tensor", tensor}, {"got", got}, {"expected", expected}});
}

std::string ShapeText(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
  return text + "]";
}

// One tensor of the model: its name in the file, where it goes.
struct Slot {
  std::string name;
  std::vector<int64_t> shape;
  at::Tensor* target;
  int64_t interleaved_heads = 0;  // > 0: rows 2i and 2i + 1 of each head are a rotary pair and are moved to i, i + D/2
};

struct Names {
  const char* embedding;
  const char* final_norm;
  const char* output;
  const char* layer;  // prefix before the layer's number
  const char *attn_norm, *wq, *wk, *wv, *wo, *q_bias, *k_bias, *v_bias, *q_norm, *k_norm, *mlp_norm, *gate, *up, *down;
};

constexpr Names kHuggingFaceNames = {"model.embed_tokens.weight",
                                     "model.norm.weight",
                                     "lm_head.weight",
                                     "model.layers.",
                                     ".input_layernorm.weight",
                                     ".self_attn.q_proj.weight",
                                     ".self_attn.k_proj.weight",
                                     ".self_attn.v_proj.weight",
                                     ".self_attn.o_proj.weight",
                                     ".self_attn.q_proj.bias",
                                     ".self_attn.k_proj.bias",
                                     ".self_attn.v_proj.bias",
                                     ".self_attn.q_norm.weight",
                                     ".self_attn.k_norm.weight",
                                     ".post_attention_layernorm.weight",
                                     ".mlp.gate_proj.weight",
                                     ".mlp.up_proj.weight",
                                     ".mlp.down_proj.weight"};

constexpr Names kGgufNames = {"token_embd.weight",   "output_norm.weight",  "output.weight",       "blk.",
                              ".attn_norm.weight",   ".attn_q.weight",      ".attn_k.weight",      ".attn_v.weight",
                              ".attn_output.weight", ".attn_q.bias",        ".attn_k.bias",        ".attn_v.bias",
                              ".attn_q_norm.weight", ".attn_k_norm.weight", ".ffn_norm.weight",    ".ffn_gate.weight",
                              ".ffn_up.weight",      ".ffn_down.weight"};
constexpr char kGgufRopeFactors[] = "rope_freqs.weight";

std::vector<Slot> SlotsOf(const Names& names, bool interleaved, Weights* weights) {
  const ModelConfig& config = weights->config;
  const int64_t q_heads = interleaved ? config.heads : 0;
  const int64_t k_heads = interleaved ? config.kv_heads : 0;
  std::vector<Slot> slots;
  slots.push_back({names.embedding, {config.vocab, config.hidden}, &weights->embedding});
  slots.push_back({names.final_norm, {config.hidden}, &weights->final_norm});
  if (!config.tied_embeddings) slots.push_back({names.output, {config.vocab, config.hidden}, &weights->output});
  for (int64_t i = 0; i < config.layers; ++i) {
    LayerWeights& layer = weights->layers[static_cast<size_t>(i)];
    const std::string prefix = names.layer + std::to_string(i);
    slots.push_back({prefix + names.attn_norm, {config.hidden}, &layer.attn_norm});
    slots.push_back({prefix + names.wq, {config.q_dim(), config.hidden}, &layer.wq, q_heads});
    slots.push_back({prefix + names.wk, {config.kv_dim(), config.hidden}, &layer.wk, k_heads});
    slots.push_back({prefix + names.wv, {config.kv_dim(), config.hidden}, &layer.wv});
    slots.push_back({prefix + names.wo, {config.hidden, config.q_dim()}, &layer.wo});
    if (config.qkv_bias) {
      slots.push_back({prefix + names.q_bias, {config.q_dim()}, &layer.q_bias});
      slots.push_back({prefix + names.k_bias, {config.kv_dim()}, &layer.k_bias});
      slots.push_back({prefix + names.v_bias, {config.kv_dim()}, &layer.v_bias});
    }
    if (config.qk_norm) {
      slots.push_back({prefix + names.q_norm, {config.head_dim}, &layer.q_norm});
      slots.push_back({prefix + names.k_norm, {config.head_dim}, &layer.k_norm});
    }
    slots.push_back({prefix + names.mlp_norm, {config.hidden}, &layer.mlp_norm});
    slots.push_back({prefix + names.gate, {config.mlp, config.hidden}, &layer.gate});
    slots.push_back({prefix + names.up, {config.mlp, config.hidden}, &layer.up});
    slots.push_back({prefix + names.down, {config.hidden, config.mlp}, &layer.down});
  }
  return slots;
}

// Tensors that hold nothing the model needs from here: rotary frequencies, cached in old files or read with the
// configuration, and a second copy of tied embeddings.
bool IsIgnored(const std::string& name, const ModelConfig& config) {
  constexpr std::string_view kFrequencies = ".rotary_emb.inv_freq";
  const std::string_view text(name);
  if (text.size() > kFrequencies.size() && text.substr(text.size() - kFrequencies.size()) == kFrequencies) return true;
  if (name == kGgufRopeFactors) return true;
  return config.tied_embeddings && name == kHuggingFaceNames.output;
}

Status CheckTable(const std::string& path, const TensorTable& table, const std::vector<Slot>& slots,
                  const ModelConfig& config) {
  std::set<std::string> known;
  for (const Slot& slot : slots) {
    const auto found = table.find(slot.name);
    if (found == table.end()) {
      const bool output = slot.target != nullptr && slot.name == kHuggingFaceNames.output;
      return Invalid(path, slot.name, "nothing",
                     ShapeText(slot.shape) + (output ? ", or tie_word_embeddings true" : ""));
    }
    if (found->second.shape != slot.shape) {
      return Invalid(path, slot.name, ShapeText(found->second.shape), ShapeText(slot.shape));
    }
    known.insert(slot.name);
  }
  for (const auto& [name, info] : table) {
    // A bias or an adapter that is silently left out would give a different model.
    if (known.count(name) == 0 && !IsIgnored(name, config)) {
      return Invalid(path, name, "a tensor " + ShapeText(info.shape),
                     "none of that name in a " + FamilyName(config.family) + " model of " +
                         std::to_string(config.layers) + " layers");
    }
  }
  return absl::OkStatus();
}

bool IsBias(std::string_view name) { return name.ends_with(".bias"); }

// A part of one tensor: rows [first, first + count), read, decoded and placed by one thread.
struct Part {
  const Slot* slot;
  const TensorInfo* info;
  int64_t first, count;
  int64_t columns;
  int64_t row_bytes;
};

std::vector<Part> PartsOf(const TensorTable& table, const std::vector<Slot>& slots) {
  std::vector<Part> parts;
  for (const Slot& slot : slots) {
    const TensorInfo& info = table.at(slot.name);
    const int64_t columns = slot.shape.back();
    const int64_t rows = info.elements() / columns;
    const int64_t row_bytes = info.bytes / rows;
    int64_t step = std::max<int64_t>(1, kStageBytes / std::max(row_bytes, columns * int64_t{sizeof(float)}));
    if (slot.interleaved_heads > 0) {  // rows move within their head: whole heads stay in one part
      const int64_t head_dim = rows / slot.interleaved_heads;
      step = std::max(head_dim, step / head_dim * head_dim);
    }
    for (int64_t first = 0; first < rows; first += step) {
      parts.push_back({&slot, &info, first, std::min(step, rows - first), columns, row_bytes});
    }
  }
  return parts;
}

// Where a row of the file goes: itself, or from interleaved rotary pairs to split halves.
int64_t TargetRow(const Slot& slot, int64_t row) {
  if (slot.interleaved_heads == 0) return row;
  const int64_t head_dim = slot.shape[0] / slot.interleaved_heads;
  const int64_t in_head = row % head_dim;
  return row - in_head + (in_head % 2) * (head_dim / 2) + in_head / 2;
}

// Of fp32 or bf16 values: whether no exponent is all ones.
template <typename Bits>
bool AllFinite(const uint8_t* values, int64_t count, Bits exponent) {
  Bits worst = 0;
  for (int64_t i = 0; i < count; ++i) {
    Bits bits;
    std::memcpy(&bits, values + i * static_cast<int64_t>(sizeof(Bits)), sizeof(bits));
    worst = std::max(worst, static_cast<Bits>(bits & exponent));
  }
  return worst != exponent;
}

// `elements` of whole blocks, encoded in `bytes` bytes.
void DecodeToBf16(TensorType type, const uint8_t* in, int64_t elements, int64_t bytes, c10::BFloat16* out) {
  if (type == TensorType::kBf16) {
    std::memcpy(out, in, static_cast<size_t>(bytes));
    return;
  }
  float piece[kPieceElements];
  for (int64_t done = 0; done < elements; done += kPieceElements) {
    const int64_t count = std::min(kPieceElements, elements - done);
    DecodeToFloat(type, in + bytes * done / elements, count, piece);
    for (int64_t i = 0; i < count; ++i) out[done + i] = c10::BFloat16(piece[i]);
  }
}

// Parts are taken in order by any number of threads; the first error or exception stops all.
class Loader {
 public:
  Loader(std::vector<Part> parts, const LoadOptions& options, at::ScalarType type)
      : parts_(std::move(parts)), options_(options), bf16_(type == at::kBFloat16) {
    for (const Part& part : parts_) total_bytes_ += part.count * part.row_bytes;
  }

  Status Run() {
    for (const Part& part : parts_) {
      const std::string& path = part.info->file;
      if (options_.random_seed || files_.count(path) != 0) continue;
      REFOCUS_ASSIGN_OR_RETURN(InputFile file, InputFile::Open(path, "WEIGHTS_INVALID"));
      files_.emplace(path, std::move(file));
    }
    RunThreads(std::clamp<int64_t>(options_.threads, 1, static_cast<int64_t>(parts_.size())));
    if (!failed_ && options_.progress) Guard([this] { options_.progress(total_bytes_, total_bytes_); });
    return exception_ == nullptr ? error_ : OutOfResources();
  }

  // Of all parts; they are summed, since their order is not fixed. After Run.
  uint64_t content_hash() const { return content_hash_; }

 private:
  // This thread is one of them. Where the system gives fewer, fewer do the work.
  void RunThreads(int64_t threads) {
    std::vector<std::thread> others;
    others.reserve(static_cast<size_t>(threads));
    try {
      while (static_cast<int64_t>(others.size()) + 1 < threads) {
        others.emplace_back([this] { Guard([this] { Work(false); }); });
      }
    } catch (const std::exception&) {  // nothing may throw here while threads are not joined
    }
    Guard([this] { Work(true); });
    for (std::thread& thread : others) thread.join();
    const int64_t got = static_cast<int64_t>(others.size()) + 1;
    if (got < threads) {
      LogWarning("loaded with " + std::to_string(got) + " threads, asked for " + std::to_string(threads) +
                 ": the system gave no more");
    }
  }

  // An exception stops the load instead of the process. The outermost function of a thread.
  template <typename Function>
  void Guard(const Function& function) noexcept {
    try {
      function();
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (exception_ == nullptr) exception_ = std::current_exception();
      failed_ = true;
    }
  }

  // What a thread threw, as most likely memory was short; made after the threads' own memory is free again.
  Status OutOfResources() const {
    std::string what = "unknown exception";
    try {
      std::rethrow_exception(exception_);
    } catch (const std::exception& error) {
      what = error.what();
    } catch (...) {
    }
    return Error(StatusCode::kResourceExhausted, "HARDWARE", "loading the weights: " + what);
  }

  void Work(bool report) {
    std::vector<uint8_t> encoded;
    std::optional<Uplink> uplink;
    if (!options_.device.is_cpu()) uplink.emplace(options_.device);
    while (!failed_) {
      const size_t index = next_++;
      if (index >= parts_.size()) break;
      if (Status status = LoadPart(parts_[index], &encoded, uplink ? &*uplink : nullptr); !status.ok()) {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (error_.ok()) error_ = status;
        failed_ = true;
        return;
      }
      const int64_t bytes = parts_[index].count * parts_[index].row_bytes;
      const int64_t done = done_bytes_.fetch_add(bytes) + bytes;
      if (report && options_.progress && done < total_bytes_) options_.progress(done, total_bytes_);
    }
    if (uplink) uplink->Finish();
  }

  Status LoadPart(const Part& part, std::vector<uint8_t>* encoded, Uplink* uplink) {
    const int64_t elements = part.count * part.columns;
    const int64_t element_bytes = bf16_ ? 2 : 4;
    uint8_t* place = uplink != nullptr ? uplink->Take(elements * element_bytes)
                                       : static_cast<uint8_t*>(part.slot->target->data_ptr()) +
                                             part.first * part.columns * element_bytes;
    REFOCUS_RETURN_IF_ERROR(Fill(part, place, encoded));
    if (options_.check_finite && !(bf16_ ? AllFinite<uint16_t>(place, elements, 0x7f80)
                                         : AllFinite<uint32_t>(place, elements, 0x7f800000))) {
      return Invalid(part.info->file, part.slot->name, "NaN or infinity", "finite values");
    }
    // A vector is one row.
    if (uplink != nullptr) uplink->Send(part.slot->target->view({-1, part.columns}).narrow(0, part.first, part.count));
    return absl::OkStatus();
  }

  // The part's rows, decoded and in their order, to `place`.
  Status Fill(const Part& part, uint8_t* place, std::vector<uint8_t>* encoded) {
    const TensorType type = part.info->type;
    const int64_t bytes = part.count * part.row_bytes;
    const bool in_order = part.slot->interleaved_heads == 0;
    if (in_order && type == (bf16_ ? TensorType::kBf16 : TensorType::kF32)) return Read(part, place);
    encoded->resize(static_cast<size_t>(std::max<int64_t>(bytes, static_cast<int64_t>(encoded->size()))));
    REFOCUS_RETURN_IF_ERROR(Read(part, encoded->data()));
    const int64_t rows = in_order ? part.count : 1;  // at once
    for (int64_t row = 0; row < part.count; row += rows) {
      const int64_t target_row = TargetRow(*part.slot, part.first + row) - part.first;
      REFOCUS_CHECK(target_row >= 0 && target_row < part.count);
      const int64_t target = target_row * part.columns;
      const uint8_t* in = encoded->data() + row * part.row_bytes;
      if (bf16_) {
        DecodeToBf16(type, in, rows * part.columns, rows * part.row_bytes,
                     reinterpret_cast<c10::BFloat16*>(place) + target);
      } else {
        DecodeToFloat(type, in, rows * part.columns, reinterpret_cast<float*>(place) + target);
      }
    }
    return absl::OkStatus();
  }

  // The part's bytes as they are in the file, or would be in a file of bf16.
  Status Read(const Part& part, uint8_t* out) {
    const int64_t bytes = part.count * part.row_bytes;
    if (options_.random_seed) {
      auto* values = reinterpret_cast<c10::BFloat16*>(out);
      if (part.slot->shape.size() == 1 && !IsBias(part.slot->name)) {
        std::fill_n(values, part.count * part.columns, c10::BFloat16(1.0f));
      } else {
        RandomValues(RandomKey(*options_.random_seed, part.slot->name), part.first * part.columns,
                     part.count * part.columns, values);
      }
    } else {
      const InputFile& file = files_.at(part.info->file);
      REFOCUS_RETURN_IF_ERROR(file.ReadAt(part.info->offset + part.first * part.row_bytes, out, bytes));
    }
    AddToHash(part, out, bytes);
    return absl::OkStatus();
  }

  // Bound to its place by the seed, so that parts that change places change the sum.
  void AddToHash(const Part& part, const void* data, int64_t bytes) {
    const std::string& name = part.slot->name;
    const uint64_t place = HashBytes(name.data(), static_cast<int64_t>(name.size()), static_cast<uint64_t>(part.first));
    content_hash_ += HashBytes(data, bytes, place);
  }

  const std::vector<Part> parts_;
  const LoadOptions& options_;
  const bool bf16_;  // else fp32
  std::map<std::string, InputFile> files_;
  int64_t total_bytes_ = 0;
  std::atomic<size_t> next_{0};
  std::atomic<int64_t> done_bytes_{0};
  std::atomic<uint64_t> content_hash_{0};
  std::atomic<bool> failed_{false};
  std::mutex mutex_;
  Status error_;                  // under mutex_ while threads run
  std::exception_ptr exception_;  // likewise
};

Status Allocate(const std::string& path, const std::vector<Slot>& slots, const LoadOptions& options,
                at::ScalarType type, Weights* weights) {
  for (const Slot& slot : slots) {
    int64_t elements = 1;
    for (const int64_t size : slot.shape) elements *= size;
    weights->bytes += elements * static_cast<int64_t>(c10::elementSize(type));
  }
  try {
    const at::TensorOptions where = at::TensorOptions().dtype(type).device(options.device);
    for (const Slot& slot : slots) *slot.target = at::empty(slot.shape, where);
    // The memory may have been used before, by work that is still enqueued; the loading threads have streams of their own.
    if (!options.device.is_cpu()) {
      c10::impl::VirtualGuardImpl(options.device.type()).getStream(options.device).synchronize();
    }
  } catch (const std::exception&) {
    return Error(StatusCode::kResourceExhausted, "HARDWARE",
                 path + ": weights need " + std::to_string(weights->bytes) + " bytes as " +
                     (type == at::kBFloat16 ? "bf16" : "fp32") + ", more than " +
                     (options.device.is_cpu() ? "this host" : options.device.str()) + " gives",
                 {{"file", path}, {"need_bytes", std::to_string(weights->bytes)}});
  }
  if (weights->config.tied_embeddings) weights->output = weights->embedding;
  return absl::OkStatus();
}

// What a folder of bf16 files would hold.
StatusOr<TensorTable> TableOfSlots(const std::vector<Slot>& slots) {
  TensorTable table;
  for (const Slot& slot : slots) {
    TensorInfo info;
    info.type = TensorType::kBf16;
    info.shape = slot.shape;
    REFOCUS_ASSIGN_OR_RETURN(info.bytes, TensorBytes(info.type, info.elements()));
    table.emplace(slot.name, std::move(info));
  }
  return table;
}

StatusOr<TensorTable> ReadTable(const std::string& path, ModelFormat format) {
  if (format == ModelFormat::kHuggingFace) return ReadSafetensorsFolder(path);
  REFOCUS_ASSIGN_OR_RETURN(GgufFile file, ReadGguf(path));
  return std::move(file.tensors);
}

}  // namespace

at::ScalarType WeightType(const at::Device& device) { return device.is_cpu() ? at::kFloat : at::kBFloat16; }

StatusOr<Weights> LoadWeights(const std::string& path, const ModelConfig& config, const LoadOptions& options) {
  REFOCUS_RETURN_IF_ERROR(config.Validate(path));
  const bool random = options.random_seed.has_value();
  ModelFormat format = ModelFormat::kHuggingFace;
  if (!random) {
    REFOCUS_ASSIGN_OR_RETURN(format, DetectModelFormat(path));
  }
  const at::ScalarType type = options.type.value_or(WeightType(options.device));
  REFOCUS_CHECK(type == at::kFloat || type == at::kBFloat16);
  Weights weights;
  weights.config = config;
  weights.layers.resize(static_cast<size_t>(config.layers));
  // llama.cpp turns neighbouring elements of Llama's heads and stores Q and K to suit; Qwen3's it turns as halves.
  const bool gguf = format == ModelFormat::kGguf;
  const bool interleaved = gguf && config.family == Family::kLlama;
  const std::vector<Slot> slots = SlotsOf(gguf ? kGgufNames : kHuggingFaceNames, interleaved, &weights);
  REFOCUS_ASSIGN_OR_RETURN(const TensorTable table, random ? TableOfSlots(slots) : ReadTable(path, format));
  REFOCUS_RETURN_IF_ERROR(CheckTable(path, table, slots, config));
  REFOCUS_RETURN_IF_ERROR(Allocate(path, slots, options, type, &weights));
  Loader loader(PartsOf(table, slots), options, type);
  REFOCUS_RETURN_IF_ERROR(loader.Run());
  weights.content_hash = loader.content_hash();
  return weights;
}

uint64_t HashWeights(const Weights& weights) {
  uint64_t hash = 0;
  const auto add = [&hash](const at::Tensor& tensor) {
    if (tensor.defined()) hash = HashTensor(tensor.cpu(), hash);
  };
  add(weights.embedding);
  add(weights.final_norm);
  if (!weights.output.is_same(weights.embedding)) add(weights.output);
  for (const LayerWeights& layer : weights.layers) {
    for (const at::Tensor* tensor :
         {&layer.attn_norm, &layer.wq, &layer.wk, &layer.wv, &layer.wo, &layer.q_bias, &layer.k_bias, &layer.v_bias,
          &layer.q_norm, &layer.k_norm, &layer.mlp_norm, &layer.gate, &layer.up, &layer.down}) {
      add(*tensor);
    }
  }
  return hash;
}

}  // namespace refocus
