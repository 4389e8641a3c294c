// adapter: list, show, export, import and delete the adapters of a context.
#include <filesystem>
#include <fstream>
#include <iostream>

#include "base/limits.h"
#include "cli/commands.h"
#include "cli/input.h"
#include "cli/interrupt.h"
#include "cli/peft.h"
#include "cli/table.h"

namespace refocus::cli {
namespace {

struct TransferOptions {
  std::string name, adapter, path;
  bool peft = false;
  bool other_model = false;
};

std::string KindText(const v1::Adapter& adapter) {
  if (adapter.kind() != v1::LORA) return "full";
  char text[64];
  std::snprintf(text, sizeof(text), "LoRA r=%lld alpha=%g", static_cast<long long>(adapter.lora_rank()),
                adapter.lora_alpha());
  return text;
}

int List(const Settings& settings, const std::string& name) {
  Client client(settings.client);
  const auto adapters = client.ListAdapters(ContextName(name));
  if (!adapters.ok()) return Finish("adapter list", adapters.status());
  if (settings.json) {
    for (const v1::Adapter& adapter : *adapters) PrintJson(adapter);
    return Finish("adapter list", absl::OkStatus());
  }
  Table table({"adapter", "kind", "revision", "steps", "held-out before", "after", "memory per rank", "from"});
  for (const v1::Adapter& a : *adapters) {
    const auto loss = [](bool has, double value) { return has ? FormatFixed(value, 4) : std::string("-"); };
    table.Add({a.id(), KindText(a), std::to_string(a.revision()), FormatCount(a.steps()),
               loss(a.has_probe_loss_before(), a.probe_loss_before()),
               loss(a.has_probe_loss_after(), a.probe_loss_after()), FormatBytes(a.memory_bytes()),
               a.imported()               ? "a file"
               : a.base_adapter().empty() ? "-"
                                          : "adapter " + a.base_adapter()});
  }
  table.Print(std::cout);
  return Finish("adapter list", absl::OkStatus());
}

// Written beside the target and renamed, so that a failure leaves what was there.
Status WriteWhole(const std::string& path, const std::function<Status(std::ostream&)>& write) {
  const std::string part = path + ".part";
  std::ofstream file(part, std::ios::binary | std::ios::trunc);
  const auto failed = [&](const std::string& what) {
    return Error(StatusCode::kInvalidArgument, "CONFIG_INVALID", path + ": " + what);
  };
  if (!file) return failed("cannot be written");
  Status status = write(file);
  file.close();
  std::error_code error;
  if (!file) status = failed("cannot be written");
  if (status.ok()) std::filesystem::rename(part, path, error);
  if (status.ok() && error) status = failed("cannot be written: " + error.message());
  if (!status.ok()) std::filesystem::remove(part, error);
  return status;
}

Status Export(Client& client, const TransferOptions& options) {
  v1::ExportAdapterRequest request;
  request.set_name(ContextName(options.name));
  request.set_adapter_id(options.adapter);
  if (!options.peft) {
    return WriteWhole(options.path, [&](std::ostream& out) {
      return client.ExportAdapter(request, [&](const std::string& data) {
        out.write(data.data(), static_cast<std::streamsize>(data.size()));
        return out.good();
      });
    });
  }
  std::string bytes;
  REFOCUS_RETURN_IF_ERROR(client.ExportAdapter(request, [&](const std::string& data) {
    bytes += data;
    return true;
  }));
  REFOCUS_ASSIGN_OR_RETURN(const AdapterFile file, ParseAdapterFile(bytes));
  return WritePeftFolder(file, options.path);
}

StatusOr<v1::Adapter> Import(Client& client, const TransferOptions& options) {
  v1::ImportAdapterRequest::Header header;
  header.set_name(ContextName(options.name));
  header.set_adapter_id(options.adapter);
  header.set_allow_other_model(options.other_model);
  if (std::filesystem::is_directory(options.path)) {
    REFOCUS_ASSIGN_OR_RETURN(const AdapterFile file, ReadPeftFolder(options.path));
    const std::string bytes = FormatAdapterFile(file);
    size_t at = 0;
    return client.ImportAdapter(header, [&](std::string* data) {
      *data = bytes.substr(at, static_cast<size_t>(kUploadChunkBytes));
      at += data->size();
      return absl::OkStatus();
    });
  }
  std::ifstream file(options.path, std::ios::binary);
  const auto failed = [&] {
    return Error(StatusCode::kInvalidArgument, "CONFIG_INVALID", options.path + ": cannot be read");
  };
  if (!file) return failed();
  return client.ImportAdapter(header, [&](std::string* data) {
    data->resize(static_cast<size_t>(kUploadChunkBytes));
    file.read(data->data(), static_cast<std::streamsize>(data->size()));
    data->resize(static_cast<size_t>(file.gcount()));
    return file.bad() ? failed() : absl::OkStatus();
  });
}

int RunExport(const Settings& settings, const TransferOptions& options) {
  InstallInterrupt();
  Client client(settings.client);
  const Status status = Export(client, options);
  if (status.ok() && !settings.quiet) {
    std::cout << "exported " << ContextName(options.name) << " adapter " << options.adapter << " to " << options.path
              << std::endl;
  }
  return Finish("adapter export", status);
}

int RunImport(const Settings& settings, const TransferOptions& options) {
  InstallInterrupt();
  Client client(settings.client);
  const auto adapter = Import(client, options);
  if (!adapter.ok()) return Finish("adapter import", adapter.status());
  if (settings.json) {
    PrintJson(*adapter);
  } else {
    std::cout << AdapterText(adapter->id(), adapter->revision()) << ", " << KindText(*adapter) << ", "
              << FormatCount(adapter->steps()) << " steps, hash " << adapter->delta_hash() << std::endl;
  }
  return Finish("adapter import", absl::OkStatus());
}

int Delete(const Settings& settings, const std::string& name, const std::vector<std::string>& adapters) {
  Client client(settings.client);
  for (const std::string& adapter : adapters) {
    v1::DeleteAdapterRequest request;
    request.set_name(ContextName(name));
    request.set_adapter_id(adapter);
    const Status status = client.DeleteAdapter(request);
    if (!status.ok()) return Finish("adapter delete", status);
    if (!settings.quiet) std::cout << "removed " << ContextName(name) << " adapter " << adapter << std::endl;
  }
  return Finish("adapter delete", absl::OkStatus());
}

}  // namespace

void AddAdapter(CLI::App& app, Settings* settings, Run* run) {
  auto* adapter = app.add_subcommand("adapter", "List, export, import and delete the adapters of a context");
  adapter->require_subcommand(1);
  const auto o = std::make_shared<TransferOptions>();

  auto* list = adapter->add_subcommand("list", "Adapters of a context");
  list->add_option("NAME", o->name, "Context")->required();
  AddCommonOptions(list, settings);
  list->callback([=] { *run = [=] { return List(*settings, o->name); }; });

  auto* out = adapter->add_subcommand("export", "Write an adapter to a file, or a LoRA to a PEFT folder");
  out->add_option("NAME", o->name, "Context")->required();
  out->add_option("ADAPTER", o->adapter, "Adapter")->required();
  out->add_option("PATH", o->path, "File to write; with --peft a folder")->required();
  out->add_flag("--peft", o->peft, "Write a PEFT folder (LoRA only)");
  AddCommonOptions(out, settings);
  out->callback([=] { *run = [=] { return RunExport(*settings, *o); }; });

  auto* in = adapter->add_subcommand("import", "Make an adapter, or its next revision, from a file or a PEFT folder");
  in->add_option("NAME", o->name, "Context")->required();
  in->add_option("PATH", o->path, "File of 'adapter export', or a PEFT folder")->required();
  in->add_option("--adapter", o->adapter, "Adapter to make or replace (the one in the file; of a folder: peft)")
      ->type_name("ID");
  in->add_flag("--other-model", o->other_model,
               "Take a file of another model of this shape: another precision, or fine-tuned");
  AddCommonOptions(in, settings);
  in->callback([=] { *run = [=] { return RunImport(*settings, *o); }; });

  auto* rm = adapter->add_subcommand("delete", "Free adapters");
  const auto adapters = std::make_shared<std::vector<std::string>>();
  rm->add_option("NAME", o->name, "Context")->required();
  rm->add_option("ADAPTER", *adapters, "Adapters")->required();
  AddCommonOptions(rm, settings);
  rm->callback([=] { *run = [=] { return Delete(*settings, o->name, *adapters); }; });
}

}  // namespace refocus::cli
