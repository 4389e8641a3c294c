// probe: how much of their attention rows give to parts of a context.
#include <algorithm>
#include <iostream>
#include <utility>

#include "cli/commands.h"
#include "cli/input.h"
#include "cli/interrupt.h"
#include "cli/table.h"

namespace refocus::cli {
namespace {

struct ProbeOptions {
  std::string name;
  std::string prompt;
  bool as_ids = false;
  std::vector<int64_t> positions;
  std::vector<std::string> ranges;
  int64_t parts = 8;
  std::vector<int32_t> layers;
  std::vector<int32_t> heads;
  bool per_head = false;
  bool per_row = false;
  AdapterChoice adapter;
};

// "BEGIN:END", both in tokens; either may be missing.
StatusOr<std::pair<int64_t, int64_t>> ParseRange(const std::string& text, int64_t token_count) {
  const size_t colon = text.find(':');
  const auto number = [](const std::string& digits, int64_t missing) -> int64_t {
    if (digits.empty()) return missing;
    if (digits.size() > 15 || digits.find_first_not_of("0123456789") != std::string::npos) return -1;
    return std::stoll(digits);
  };
  const int64_t begin = colon == std::string::npos ? -1 : number(text.substr(0, colon), 0);
  const int64_t end = colon == std::string::npos ? -1 : number(text.substr(colon + 1), token_count);
  if (begin >= 0 && end >= begin) return std::pair{begin, end};
  return Error(StatusCode::kInvalidArgument, "CONFIG_INVALID",
               "--range: got '" + text + "', allowed BEGIN:END in tokens with BEGIN <= END, as 0:512",
               {{"got", text}});
}

StatusOr<v1::ProbeAttentionRequest> MakeRequest(const ProbeOptions& options, const v1::Context& context) {
  v1::ProbeAttentionRequest request;
  request.set_name(context.name());
  request.set_adapter_id(ResolveAdapter(options.adapter, context));
  if (options.as_ids) {
    REFOCUS_ASSIGN_OR_RETURN(const auto ids, ParseIds(options.prompt));
    request.mutable_prompt()->mutable_ids()->mutable_ids()->Add(ids.begin(), ids.end());
  } else {
    request.mutable_prompt()->set_text(options.prompt);
  }
  const auto add_range = [&](int64_t begin, int64_t end) {
    auto* range = request.add_ranges();
    range->set_begin(begin);
    range->set_end(end);
  };
  for (const std::string& text : options.ranges) {
    REFOCUS_ASSIGN_OR_RETURN(const auto range, ParseRange(text, context.token_count()));
    add_range(range.first, range.second);
  }
  for (int64_t part = 0; options.ranges.empty() && part < options.parts; ++part) {
    add_range(context.token_count() * part / options.parts, context.token_count() * (part + 1) / options.parts);
  }
  request.mutable_positions()->Add(options.positions.begin(), options.positions.end());
  request.mutable_layers()->Add(options.layers.begin(), options.layers.end());
  request.mutable_heads()->Add(options.heads.begin(), options.heads.end());
  request.set_mean_over_heads(!options.per_head);
  request.set_mean_over_rows(!options.per_row);
  return request;
}

struct Row {
  int32_t layer = 0;
  int64_t position = -1;  // of the mean over rows: -1
  int head = -1;          // index among the probed ones; of the mean over heads: -1
  std::vector<double> masses;
};

// The event's values [rows, ranges, heads], a row of the table for each row and head.
void AddRows(const v1::ProbeAttentionEvent& event, int ranges, std::vector<Row>* rows) {
  const int row_count = static_cast<int>(event.row_count());
  if (row_count == 0 || event.mass_size() == 0) return;
  const int heads = event.mass_size() / row_count / ranges;
  for (int i = 0; i < row_count; ++i) {
    for (int head = 0; head < heads; ++head) {
      Row& row = rows->emplace_back();
      row.layer = event.layer();
      if (i < event.positions_size()) row.position = event.positions(i);
      row.head = head;
      for (int range = 0; range < ranges; ++range) {
        row.masses.push_back(event.mass((i * ranges + range) * heads + head));
      }
    }
  }
}

void PrintRows(const v1::ProbeAttentionRequest& request, const v1::ProbeAttentionSummary& summary,
               const ProbeOptions& options, const std::vector<Row>& rows) {
  std::vector<std::string> header = {"layer"};
  if (options.per_row) header.push_back("position");
  if (options.per_head) header.push_back("head");
  const size_t keys = header.size();
  for (const auto& range : request.ranges()) {
    header.push_back(FormatCount(range.begin()) + " to " + FormatCount(range.end()));
  }
  Table table(header);
  std::vector<double> sums(request.ranges_size(), 0.0);
  for (const Row& row : rows) {
    std::vector<std::string> cells = {std::to_string(row.layer)};
    if (options.per_row) cells.push_back(FormatCount(row.position));
    if (options.per_head) cells.push_back(std::to_string(summary.heads(row.head)));
    for (size_t i = 0; i < row.masses.size(); ++i) {
      cells.push_back(FormatFixed(row.masses[i], 4));
      sums[i] += row.masses[i];
    }
    table.Add(std::move(cells));
  }
  const auto add_line = [&](const std::string& label, const auto& value) {
    std::vector<std::string> cells(keys, "-");
    cells[0] = label;
    for (int i = 0; i < request.ranges_size(); ++i) cells.push_back(FormatFixed(value(i), 4));
    table.Add(std::move(cells));
  };
  add_line("mean", [&](int i) { return sums[i] / static_cast<double>(std::max<size_t>(1, rows.size())); });
  // Of a row that sees the whole context and no more, were its attention spread evenly.
  add_line("even spread", [&](int i) {
    return static_cast<double>(request.ranges(i).end() - request.ranges(i).begin()) /
           static_cast<double>(summary.context_tokens());
  });
  table.Print(std::cout);
}

int Probe(const Settings& settings, const ProbeOptions& options) {
  InstallInterrupt();
  Client client(settings.client);
  const auto context = client.GetContext(ContextName(options.name));
  if (!context.ok()) return Finish("probe", context.status());
  const auto request = MakeRequest(options, *context);
  if (!request.ok()) return Finish("probe", request.status());
  std::vector<Row> rows;
  v1::ProbeAttentionSummary summary;
  const Status status = client.ProbeAttention(*request, [&](const v1::ProbeAttentionEvent& event) {
    EmitEvent(settings, event);
    if (event.has_summary()) summary = event.summary();
    if (!settings.json) AddRows(event, request->ranges_size(), &rows);
  });
  if (!status.ok() || settings.json) return Finish("probe", status);
  PrintRows(*request, summary, options, rows);
  if (!settings.quiet) {
    std::cerr << "[share of attention, " << (options.per_row ? "of " : "mean of ") << FormatCount(summary.rows())
              << " rows" << (options.per_head ? "" : ", mean of heads") << "; "
              << AdapterText(request->adapter_id(), summary.adapter_revision()) << "; "
              << FormatSeconds(summary.seconds()) << "]" << std::endl;
  }
  return Finish("probe", status);
}

}  // namespace

void AddProbe(CLI::App& app, Settings* settings, Run* run) {
  auto* verb = app.add_subcommand("probe", "How much attention a question gives to parts of a context");
  const auto o = std::make_shared<ProbeOptions>();
  verb->add_option("NAME", o->name, "Context")->required();
  verb->add_option("PROMPT", o->prompt, "Text behind the context whose tokens are the rows (none: its last token)");
  AddAdapterOptions(verb, &o->adapter);
  const std::string rows = "Rows and keys";
  verb->add_flag("--ids", o->as_ids, "The prompt is token ids in decimal")->group(rows);
  verb->add_option("--positions", o->positions,
                   "Rows by position: of the context, or of the prompt, which begins at the context's token count")
      ->delimiter(',')->group(rows);
  auto* range = verb->add_option("--range", o->ranges, "Keys BEGIN:END of the context, in tokens, repeatable")
      ->type_name("BEGIN:END")->group(rows);
  verb->add_option("--parts", o->parts, "Without --range: so many equal parts of the context")
      ->check(CLI::Range(1, 64))->capture_default_str()->excludes(range)->group(rows);
  verb->add_option("--layers", o->layers, "Layers from 0 on (all)")->delimiter(',')->group(rows);
  verb->add_option("--heads", o->heads, "Query heads from 0 on (all)")->delimiter(',')->group(rows);
  const std::string output = "Output";
  verb->add_flag("--per-head", o->per_head, "Every head instead of their mean")->group(output);
  verb->add_flag("--per-row", o->per_row, "Every row instead of their mean")->group(output);
  AddCommonOptions(verb, settings);
  AddEventOptions(verb, settings);
  verb->callback([=] { *run = [=] { return Probe(*settings, *o); }; });
}

}  // namespace refocus::cli
