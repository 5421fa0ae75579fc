#include "engine/trace.h"

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <sstream>

namespace hvd_backup {

namespace {

std::string quoted(const std::string& text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      out += '\\';
      out += c;
    } else if (static_cast<unsigned char>(c) < 0x20) {
      char escaped[8];
      std::snprintf(escaped, sizeof escaped, "\\u%04x", static_cast<unsigned>(c));
      out += escaped;
    } else {
      out += c;
    }
  }
  return out + "\"";
}

template <class T>
void write_list(std::ostream& out, const char* name, const std::vector<T>& list, TimeUs origin) {
  if (list.empty()) return;
  out << ", \"" << name << "\": [";
  for (std::size_t i = 0; i < list.size(); ++i) out << (i ? ", " : "") << static_cast<std::int64_t>(list[i]) - origin;
  out << "]";
}

}  // namespace

Trace::Trace(const std::string& path) : began_(monotonic_us()) {
  if (path.empty()) return;
  file_.open(path, std::ios::trunc);
  if (!file_) throw UsageError("the trace can't be written to '" + path + "': " + std::strerror(errno));
}

void Trace::write(const std::vector<Record>& records) {
  if (!file_.is_open() || records.empty()) return;
  for (const Record& record : records) {
    file_ << "{\"t_us\": " << record.at - began_ << ", \"event\": \"" << name_of(record.event)
          << "\", \"channel\": " << quoted(record.channel) << ", \"step\": " << record.step
          << ", \"scope\": " << record.scope << ", \"attempt\": " << record.attempt;
    write_list(file_, "ranks", record.ranks, 0);
    write_list(file_, "bases", record.bases, 0);
    write_list(file_, "arrivals_us", record.arrivals, began_);
    if (!record.reason.empty()) file_ << ", \"reason\": " << quoted(record.reason);
    file_ << "}\n";
  }
  file_.flush();
}

}  // namespace hvd_backup
