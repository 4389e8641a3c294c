// Refusals that several requests share, and names that the server makes.
#pragma once

#include <cstdint>
#include <cstdio>
#include <string>

#include "base/status.h"
#include "coordinator/core/session.h"

namespace refocus {

inline std::string RandomName(uint64_t random) {
  char text[32];
  std::snprintf(text, sizeof(text), "%016llx", static_cast<unsigned long long>(random));
  return text;
}

inline Status NotReady(const Session& session) {
  return Error(StatusCode::kFailedPrecondition, "CONTEXT_NOT_READY",
               session.name() + ": got state " + api::Context::State_Name(session.state()) +
                   ", allowed READY; call PrefillContext first",
               {{"name", session.name()}, {"state", api::Context::State_Name(session.state())}});
}

inline Status AdapterNotFound(const Session& session, const std::string& id) {
  return Error(StatusCode::kNotFound, "ADAPTER_NOT_FOUND", session.name() + " has no adapter \"" + id + "\"",
               {{"name", session.name()}, {"adapter_id", id}});
}

inline Status Busy(StatusCode code, const std::string& name, const std::string& what) {
  return Error(code, "CONTEXT_BUSY", name + ": " + what, {{"name", name}});
}

}  // namespace refocus
