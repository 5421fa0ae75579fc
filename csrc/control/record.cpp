#include "control/record.h"

namespace hvd_backup {

const char* name_of(Record::Event event) {
  switch (event) {
    case Record::Event::opened:
      return "opened";
    case Record::Event::decision:
      return "decision";
    case Record::Event::dropped:
      return "dropped";
    case Record::Event::replaced:
      return "replaced";
    case Record::Event::stopped:
      return "stopped";
    case Record::Event::final_:
      return "final";
    case Record::Event::caught_up:
      return "caught_up";
    case Record::Event::resumed:
      return "resumed";
    case Record::Event::round_over:
      return "round_over";
    case Record::Event::chosen:
      return "chosen";
    case Record::Event::held:
      return "held";
    case Record::Event::beyond:
      return "beyond";
    case Record::Event::resynced:
      return "resynced";
    case Record::Event::stalled:
      return "stalled";
    case Record::Event::gone:
      return "gone";
    case Record::Event::lost:
      return "lost";
    case Record::Event::failed:
      return "failed";
  }
  return "unknown";
}

}  // namespace hvd_backup
