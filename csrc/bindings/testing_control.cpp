// The control layer for tests: the coordinator, a member and the policies, each by itself, without an engine. Messages
// come out as the bytes that travel, so that a simulated network carries exactly what a real one does. `describe` and
// `compose` turn them into dicts and back; both walk the messages' own lists of fields, and only the names are written
// down here.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <sstream>

#include "base/error.h"
#include "bindings/testing.h"
#include "control/coordinator.h"
#include "control/member.h"
#include "control/policy.h"
#include "control/rounds.h"
#include "engine/idle.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace hvd_backup {

namespace {

// The names of a message's fields, in the order of its fields(); those of messages begin with the name of their kind.
template <class T>
constexpr const char* field_names = nullptr;
template <>
constexpr const char* field_names<Open> = "Open name kind description proposal options wait_for_all on_device";
template <>
constexpr const char* field_names<Arrive> =
    "Arrive channel step scope base round scopes buckets samples finite metadata payload";
template <>
constexpr const char* field_names<Withdraw> = "Withdraw channel step scope";
template <>
constexpr const char* field_names<Waiting> = "Waiting channel step";
template <>
constexpr const char* field_names<Done> = "Done channel step scope attempt kept squares";
template <>
constexpr const char* field_names<Kept> = "Kept channel step scope";
template <>
constexpr const char* field_names<Progress> =
    "Progress channel step scope attempt unsubmitted contributions_missing results_missing";
template <>
constexpr const char* field_names<Sync> = "Sync channel have round lost";
template <>
constexpr const char* field_names<Offered> = "Offered channel step bytes";
template <>
constexpr const char* field_names<StateLost> = "StateLost channel server step";
template <>
constexpr const char* field_names<BeginRound> = "BeginRound channel round length align_every";
template <>
constexpr const char* field_names<Away> = "Away channel round";
template <>
constexpr const char* field_names<Leave> = "Leave channel round";
template <>
constexpr const char* field_names<Pause> = "Pause";
template <>
constexpr const char* field_names<Join> = "Join";
template <>
constexpr const char* field_names<CanGroup> = "CanGroup why_not means";
template <>
constexpr const char* field_names<Formed> = "Formed group failure";
template <>
constexpr const char* field_names<Exit> = "Exit failure";
template <>
constexpr const char* field_names<Opened> = "Opened name channel proposal measured";
template <>
constexpr const char* field_names<Failed> = "Failed name reason";
template <>
constexpr const char* field_names<Decision> =
    "Decision channel step scope attempt tag votes group contributors weights samples required metadata result outlook";
template <>
constexpr const char* field_names<Final> = "Final channel step scope attempt stopped outlook";
template <>
constexpr const char* field_names<Probe> = "Probe channel step scope attempt";
template <>
constexpr const char* field_names<Late> = "Late channel step scope newest outlook";
template <>
constexpr const char* field_names<History> = "History channel updates outlook";
template <>
constexpr const char* field_names<Resume> = "Resume channel outlook";
template <>
constexpr const char* field_names<Over> = "Over channel round end outlook";
template <>
constexpr const char* field_names<Offer> = "Offer channel";
template <>
constexpr const char* field_names<Dismiss> = "Dismiss channel step";
template <>
constexpr const char* field_names<Resync> = "Resync channel server step bytes contributed instead outlook";
template <>
constexpr const char* field_names<Joined> = "Joined last";
template <>
constexpr const char* field_names<Lost> = "Lost rank";
template <>
constexpr const char* field_names<Form> = "Form group members name";
template <>
constexpr const char* field_names<Disband> = "Disband group";
template <>
constexpr const char* field_names<AllGone> = "AllGone";
template <>
constexpr const char* field_names<Pull> = "Pull channel step bucket shard tag";
template <>
constexpr const char* field_names<Refused> = "Refused pull forgotten";
template <>
constexpr const char* field_names<PullState> = "PullState channel step begin bytes tag";
template <>
constexpr const char* field_names<NoState> = "NoState channel step";
template <>
constexpr const char* field_names<ChannelOptions> =
    "ChannelOptions required grace_us max_misses max_lag automatic resync";
template <>
constexpr const char* field_names<Squares> = "Squares contributions mean";
template <>
constexpr const char* field_names<Outlook> = "Outlook round_end all_have beyond";
template <>
constexpr const char* field_names<PastUpdate> = "PastUpdate step contributors samples required metadata";

// Any bytes are a Python string, and the same string gives the same bytes again.
nb::object text_of(const std::string& bytes) {
  return nb::steal(PyUnicode_DecodeUTF8(bytes.data(), static_cast<Py_ssize_t>(bytes.size()), "surrogateescape"));
}

std::string bytes_of(nb::handle text) {
  const nb::object encoded = nb::steal(PyUnicode_AsEncodedString(text.ptr(), "utf-8", "surrogateescape"));
  if (!encoded.is_valid()) throw nb::python_error();
  const nb::bytes bytes = nb::borrow<nb::bytes>(encoded);
  return {static_cast<const char*>(bytes.data()), bytes.size()};
}

template <class T>
concept HasFields = field_names<T> != nullptr;

template <class T>
nb::object to_python(const T& value);

// An archive, as Writer and Reader are: fields() hands it every field, and it takes the next name for each.
struct Describer {
  nb::dict out;
  std::istringstream names;
  template <class... T>
  void operator()(const T&... values) {
    (add(values), ...);
  }
  template <class T>
  void add(const T& value) {
    std::string name;
    names >> name;
    out[name.c_str()] = to_python(value);
  }
};

template <class T>
nb::object to_python(const T& value) {
  if constexpr (HasFields<T>) {
    Describer describer{nb::dict(), std::istringstream(field_names<T>)};
    std::string kind;
    describer.names >> kind;
    const_cast<T&>(value).fields(describer);  // it only reads them
    return describer.out;
  } else if constexpr (std::is_same_v<T, std::string>) {
    return text_of(value);
  } else if constexpr (std::is_enum_v<T>) {
    return nb::cast(static_cast<int>(value));
  } else if constexpr (std::is_arithmetic_v<T>) {
    return nb::cast(value);
  } else {
    nb::list list;
    for (const auto& item : value) list.append(to_python(item));
    return list;
  }
}

template <class T>
void from_python(nb::handle given, T& value);

// The reverse. A field that the dict does not have keeps its default.
struct Composer {
  nb::dict given;
  std::istringstream names;
  template <class... T>
  void operator()(T&... values) {
    (take(values), ...);
  }
  template <class T>
  void take(T& value) {
    std::string name;
    names >> name;
    if (given.contains(name.c_str())) from_python(given[name.c_str()], value);
  }
};

template <class T>
void from_python(nb::handle given, T& value) {
  if constexpr (HasFields<T>) {
    Composer composer{nb::cast<nb::dict>(given), std::istringstream(field_names<T>)};
    std::string kind;
    composer.names >> kind;
    value.fields(composer);
  } else if constexpr (std::is_same_v<T, std::string>) {
    value = bytes_of(given);
  } else if constexpr (std::is_enum_v<T>) {
    value = static_cast<T>(nb::cast<int>(given));
  } else if constexpr (std::is_arithmetic_v<T>) {
    value = nb::cast<T>(given);
  } else {
    for (nb::handle item : given) from_python(item, value.emplace_back());
  }
}

std::string kind_of(const Message& message) {
  return std::visit(
      [](const auto& body) {
        std::string kind;
        std::istringstream(field_names<std::decay_t<decltype(body)>>) >> kind;
        return kind;
      },
      message);
}

nb::bytes to_bytes(const Message& message) {
  const std::vector<std::byte> encoded = encode(message);
  return nb::bytes(encoded.data(), encoded.size());
}

Message from_bytes(const nb::bytes& bytes) {
  const auto* begin = static_cast<const std::byte*>(bytes.data());
  return decode({begin, begin + bytes.size()});
}

nb::dict describe(const nb::bytes& bytes) {
  const Message message = from_bytes(bytes);
  nb::dict out = nb::cast<nb::dict>(std::visit([](const auto& body) { return to_python(body); }, message));
  out["message"] = kind_of(message);
  return out;
}

template <std::size_t Index = 0>
Message message_of_kind(const std::string& kind) {
  if constexpr (Index == std::variant_size_v<Message>) {
    throw UsageError("there is no message " + kind);
  } else {
    Message message{std::in_place_index<Index>};
    return kind_of(message) == kind ? message : message_of_kind<Index + 1>(kind);
  }
}

nb::bytes compose(const std::string& kind, const nb::kwargs& fields) {
  Message message = message_of_kind(kind);
  std::visit([&](auto& body) { from_python(fields, body); }, message);
  return to_bytes(message);
}

nb::dict describe_record(const Record& record) {
  nb::dict out;
  out["at"] = record.at;
  out["event"] = name_of(record.event);
  out["channel"] = record.channel;
  out["step"] = record.step;
  out["scope"] = record.scope;
  out["attempt"] = record.attempt;
  out["ranks"] = record.ranks;
  out["bases"] = record.bases;
  out["arrivals"] = record.arrivals;
  out["reason"] = record.reason;
  out["opened_at"] = record.opened_at;
  out["required"] = record.required;
  out["weights"] = record.weights;
  out["squares"] = nb::make_tuple(record.squares.contributions, record.squares.mean);
  return out;
}

nb::dict describe_update(const Update& update) {
  constexpr const char* kinds[] = {"update", "resume", "over", "offer", "resync"};
  nb::dict out;
  out["kind"] = kinds[static_cast<int>(update.kind)];
  out["step"] = update.step;
  out["contributors"] = update.contributors;
  out["contributed"] = update.contributed;
  out["samples"] = update.samples;
  out["required"] = update.required;
  out["metadata"] = text_of(update.metadata);
  return out;
}

ChannelKind channel_kind(const std::string& name) {
  if (name == "training") return ChannelKind::training;
  if (name == "collective") return ChannelKind::collective;
  throw UsageError("unknown kind " + name);
}

// As the engine hands messages on.
void receive(Member& member, const nb::bytes& bytes) {
  const Message message = from_bytes(bytes);
  std::visit(
      [&](const auto& body) {
        using Body = std::decay_t<decltype(body)>;
        if constexpr (std::is_same_v<Body, Opened>) {
          member.opened(body.channel);
        } else if constexpr (requires { member.receive(body); }) {
          member.receive(body);
        } else {
          throw UsageError(kind_of(message) + " is not for a member");
        }
      },
      message);
}

nb::object take_catch_up(Member& member) {
  const std::optional<CatchUp> missed = member.take_catch_up();
  if (!missed) return nb::none();
  nb::dict out = nb::cast<nb::dict>(to_python(missed->update));
  out["scopes"] = missed->scopes;
  return out;
}

template <class Items, class Convert>
nb::list list_of(const Items& items, Convert convert) {
  nb::list out;
  for (const auto& item : items) out.append(convert(item));
  return out;
}

void register_policies(nb::module_& module) {
  nb::class_<Verdict>(module, "Verdict")
      .def_ro("yes", &Verdict::yes)
      .def_ro("look_again", &Verdict::look_again)
      .def_ro("reason", &Verdict::reason);
  module.def("needed_arrivals", &needed_arrivals, "required"_a, "arrived"_a, "able"_a);
  module.def(
      "close_decision",
      [](int required, int arrived, int able, int nonfinite, bool owed, TimeUs reentry_us, TimeUs now, TimeUs grace_us,
         std::optional<TimeUs> nth_arrival) {
        CloseView view;
        view.required = required;
        view.arrived = arrived;
        view.able = able;
        view.nonfinite = nonfinite;
        view.owed = owed;
        view.reentry_us = reentry_us;
        view.now = now;
        view.grace_us = grace_us;
        view.nth_arrival = nth_arrival;
        return close_decision(view);
      },
      nb::kw_only(), "required"_a, "arrived"_a, "able"_a, "nonfinite"_a = 0, "owed"_a = false, "reentry_us"_a = 0,
      "now"_a = 0, "grace_us"_a = 0, "nth_arrival"_a = nb::none());
  module.def(
      "resume_now",
      [](TimeUs now, TimeUs opened, TimeUs typical_us, bool needed) {
        ResumeView view;
        view.now = now;
        view.opened = opened;
        view.typical_us = typical_us;
        view.needed = needed;
        return resume_now(view);
      },
      nb::kw_only(), "now"_a, "opened"_a, "typical_us"_a, "needed"_a = false);
  nb::class_<ReentryBudget>(module, "ReentryBudget")
      .def(nb::init<>())
      .def("wait_us", &ReentryBudget::wait_us, "handicap_us"_a, "typical_us"_a)
      .def("step_decided", &ReentryBudget::step_decided, "typical_us"_a)
      .def("spend", &ReentryBudget::spend, "waited_us"_a);
  nb::class_<RequiredChooser>(module, "RequiredChooser")
      .def(nb::init<int, int>(), "size"_a, "least"_a)
      .def_prop_ro("required", &RequiredChooser::required)
      .def_prop_ro("noise_scale", &RequiredChooser::noise_scale)
      .def("computed", &RequiredChooser::computed, "rank"_a, "step"_a, "took_us"_a)
      .def("finished", &RequiredChooser::finished, "tail_us"_a)
      .def(
          "measured",
          [](RequiredChooser& self, double contributions, double mean, const std::vector<double>& weights) {
            self.measured({contributions, mean}, weights);
          },
          "contribution_squares"_a, "mean_squares"_a, "weights"_a)
      .def("look", &RequiredChooser::look, "step"_a, "busy_us"_a);
  module.def("is_on_time", &is_on_time, "took_us"_a, "decided_us"_a);
  nb::enum_<Expecting>(module, "Expecting")
      .value("nothing", Expecting::nothing)
      .value("message", Expecting::message)
      .value("transfer", Expecting::transfer);
  module.def("nap_us", &nap_us, "idle_us"_a, "expecting"_a, "spins_us"_a);
  nb::class_<Rounds>(module, "Rounds")
      .def(nb::init<int>(), "size"_a)
      .def_prop_ro("current", &Rounds::current)
      .def_prop_ro("start", &Rounds::start)
      .def_prop_ro("followed", &Rounds::followed)
      .def_prop_ro("align_every", &Rounds::align_every)
      .def("is_over", &Rounds::is_over, "round"_a)
      .def("end_of", &Rounds::end_of, "round"_a)
      .def("begin", &Rounds::begin, "rank"_a, "length"_a, "align_every"_a = 0)
      .def("has_begun", &Rounds::has_begun, "rank"_a)
      .def("planned_end", &Rounds::planned_end, "gone"_a)
      .def("fix_end", &Rounds::fix_end, "step"_a)
      .def("close", &Rounds::close, "end"_a);
}

void register_coordinator(nb::module_& module) {
  nb::class_<Coordinator>(module, "Coordinator")
      .def(
          "__init__",
          [](Coordinator* self, int size, TimeUs stall_check_us, bool survives_losses) {
            new (self) Coordinator(size, false, {}, stall_check_us, survives_losses);
            self->set_name_group([] { return GroupName{"a new group", ""}; });
          },
          "size"_a, "stall_check_us"_a = 0, "survives_losses"_a = false)
      .def("lost", &Coordinator::lost, "rank"_a, "now"_a)
      .def(
          "receive",
          [](Coordinator& self, int from, const nb::bytes& message, TimeUs now) {
            self.receive(from, from_bytes(message), now);
          },
          "sender"_a, "message"_a, "now"_a)
      .def("tick", &Coordinator::tick, "now"_a)
      .def("next_deadline", &Coordinator::next_deadline)
      .def("take_replies",
           [](Coordinator& self) {
             return list_of(self.take_replies(),
                            [](const Reply& reply) { return nb::make_tuple(reply.to, to_bytes(reply.message)); });
           })
      .def("cannot_name_groups",
           [](Coordinator& self, const std::string& why) { self.set_name_group([why] { return GroupName{"", why}; }); })
      .def("take_news", &Coordinator::take_news)
      .def("take_records", [](Coordinator& self) { return list_of(self.take_records(), describe_record); });
}

Resync from_dict(const nb::dict& fields) {
  Resync resync;
  from_python(fields, resync);
  return resync;
}

void register_member(nb::module_& module) {
  nb::class_<Member>(module, "Member")
      .def(
          "__init__",
          [](Member* self, int rank, const std::string& kind, bool arrive_first) {
            new (self) Member(rank, channel_kind(kind), arrive_first);
          },
          "rank"_a, "kind"_a = "training", "arrive_first"_a = true)
      .def("set_layout", &Member::set_layout, "scope_of_bucket"_a)
      .def("begin", &Member::begin, "samples"_a = 1.0, "metadata"_a = "")
      .def("submit", &Member::submit, "bucket"_a, "finite"_a = true)
      .def("next", &Member::next)
      .def("take",
           [](Member& self) {
             if (!self.next()) throw UsageError("take() before next() was true");  // there would be nothing to take
             return describe_update(self.take());
           })
      .def("begin_round", &Member::begin_round, "length"_a, "align_every"_a = 0)
      .def("away", &Member::away)
      .def("leave", &Member::leave)
      .def("announce_waiting", &Member::announce_waiting)
      .def("withdraw", &Member::withdraw, "also_complete"_a = false)
      .def_prop_ro("step", &Member::step)
      .def_prop_ro("round_end", &Member::round_end)
      .def_prop_ro("round_over", &Member::round_over)
      .def_prop_ro("all_have", &Member::all_have)
      .def("contributing", &Member::contributing, "step"_a, "scope"_a, "attempt"_a)
      .def("unsubmitted", &Member::unsubmitted, "scope"_a)
      .def("hold", &Member::hold)
      .def("commit", [](Member& self) { return list_of(self.commit(), to_python<Decision>); })
      .def("contributing_to_any", &Member::contributing_to_any)
      .def("decided", &Member::decided)
      .def("counters",
           [](const Member& self) {
             const Counters& counters = self.counters();
             nb::dict out;
             out["contributed"] = counters.contributed;
             out["dropped"] = counters.dropped;
             out["caught_up"] = counters.caught_up;
             out["resynced"] = counters.resynced;
             return out;
           })
      .def("receive", &receive, "message"_a)
      .def(
          "reduced",
          [](Member& self, Step step, int scope, int attempt, double contributions, double mean) {
            self.reduced(step, scope, attempt, {contributions, mean});
          },
          "step"_a, "scope"_a, "attempt"_a, "contribution_squares"_a = 0.0, "mean_squares"_a = 0.0)
      .def("fetched", &Member::fetched, "step"_a)
      .def("take_messages", [](Member& self) { return list_of(self.take_messages(), to_bytes); })
      .def("take_reductions", [](Member& self) { return list_of(self.take_reductions(), to_python<Decision>); })
      .def("take_catch_up", &take_catch_up)
      .def_prop_ro("state_wanted", &Member::state_wanted)
      .def_prop_ro("state_will_be_wanted", &Member::state_will_be_wanted)
      .def_prop_ro("round_start", &Member::round_start)
      .def("offer", &Member::offer, "bytes"_a)
      .def("fetch_lost", &Member::fetch_lost, "step"_a)
      .def(
          "state_here", [](Member& self, const nb::dict& resync) { return self.state_here(from_dict(resync)); },
          "resync"_a)
      .def(
          "state_lost", [](Member& self, const nb::dict& resync) { self.state_lost(from_dict(resync)); }, "resync"_a)
      .def("take_resyncs", [](Member& self) { return list_of(self.take_resyncs(), to_python<Resync>); });
}

}  // namespace

void register_control(nb::module_& module) {
  module.def("describe", &describe, "message"_a);
  module.def("compose", &compose);  // compose(kind, field=...); the kind has no name, for Open has a field `kind`
  register_policies(module);
  register_coordinator(module);
  register_member(module);
}

}  // namespace hvd_backup
