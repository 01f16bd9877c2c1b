"""Turns gin files and flags into the objects of a run; the only module that imports gin.

Files and flags are first read into a list of settings, each with its source, so that `t5x explain` can print what set
a value and what that overrode, and so that mistakes are found before anything is built. Gin then receives the last
setting of each name.
"""

import ast
import difflib
import functools
import importlib
import importlib.util
import inspect
import re
import tokenize
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from etils import epath

import gin
from codellm_jax import t5x_names
from codellm_jax.contents import whole_text
from codellm_jax.settings import SHIPPED, Configuration, Setting, nearest, references, shipped_gin_files
from gin import config_parser

# The schedules that train.learning_rate accepts.
LEARNING_RATES = ("warmup_cosine", "warmup_linear", "warmup_stable_decay", "warmup_constant", "inverse_square_root")
# The configurables of gin files, and the modules that define them. Imported only when a configuration is built.
CONFIGURABLES = {
    "train": "codellm_jax.training.plan:Training",
    "study": "codellm_jax.study.arms:Study",
    "evaluate": "codellm_jax.evaluation.evaluate:CheckpointEvaluation",
    "evaluation": "codellm_jax.evaluation.evaluate:Evaluation",
    "checkpoint": "codellm_jax.evaluation.trained:Checkpoint",
    "infer": "codellm_jax.evaluation.infer:Inference",
    "contamination": "codellm_jax.evaluation.contamination:Contamination",
    "prepare": "codellm_jax.prepare.preparation:Preparation",
    "inputs": "tasks.corpora.inputs:Inputs",
    "instruction_prompt": "tasks.instruction_sets.prompts:alpaca_prompt",
    "conversation_turns": "tasks.instruction_sets.prompts:conversation_turns",
    "sampling": "codellm_jax.evaluation.sampling:Sampling",
    "mixture": "codellm_jax.mixture.mixture:Mixture",
    "tasks": "tasks:Definitions",
    "benchmarks": "tasks.benchmarks.judging:Benchmarks",
    "vocabulary": "codellm_jax.vocabulary:load_vocabulary",
    "model": "codellm_jax.model.decoder:DecoderConfig",
    "mesh": "codellm_jax.runtime.partitioning:MeshShape",
    "adamw": "codellm_jax.runtime.optimization:adamw",
    "chain": "codellm_jax.runtime.optimization:chain",
    **{name: f"codellm_jax.runtime.optimization:{name}" for name in LEARNING_RATES},
}


class _Reference:
    """A reference to a configurable or macro that prints as gin writes it."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return self._text


class _AsWritten(config_parser.ParserDelegate):
    """Keeps references as written."""

    def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> _Reference:
        return _Reference(f"@{scoped_configurable_name}{'()' if evaluate else ''}")

    def macro(self, macro_name: str) -> _Reference:
        return _Reference(f"%{macro_name}")


def read_configuration(
    gin_files: Sequence[str], overrides: Sequence[tuple[str, str]], search_paths: Sequence[str] = (),
    parent: Mapping[str, str] | None = None,
) -> Configuration:
    """Reads gin files in order, then overrides; later settings override earlier ones.

    Args:
      gin_files: paths, searched for as given, then in `search_paths`, then among the shipped files.
      overrides: (name, value) as on the command line; a value that is not a gin literal is a string.
      parent: settings, name -> value, of the run to start from, if it is not trained yet; else they are read from its
        newest checkpoint.

    Raises:
      FileNotFoundError: a file does not exist.
      ValueError: a syntax error, an unknown parameter, or a macro that nothing uses; in one line.
    """
    read = read_settings(gin_files, overrides, search_paths)
    inherited = (_inherited(read.settings) if parent is None else
                 _taken_over(parent, read.settings, "the run to start from"))
    inherited += _branch_step(read.settings)
    configuration = Configuration((*inherited, *read.settings), read.imports, len(inherited))
    _require_known_names(configuration)
    return configuration


def read_settings(
    gin_files: Sequence[str], overrides: Sequence[tuple[str, str]], search_paths: Sequence[str] = ()
) -> Configuration:
    """The settings as written, unchecked and without inherited ones; imports nothing that they name."""
    settings: list[Setting] = []
    imports: list[str] = []
    for file in gin_files:
        _read_file(file, search_paths, settings, imports, included_by=None)
    for name, value in overrides:
        settings.append(Setting(name, as_gin_value(value), f"--gin.{name}"))
    return Configuration(tuple(settings), tuple(dict.fromkeys(imports)))


def settings_in(file: str) -> list[Setting]:
    """The bindings of any one gin file as written; its includes and imports are ignored."""
    return [statement for statement in _statements(file, whole_text(file)) if isinstance(statement, Setting)]


def _read_file(
    file: str, search_paths: Sequence[str], settings: list[Setting], imports: list[str], included_by: str | None
) -> None:
    for statement in _statements(file, re.sub("\r\n?", "\n", whole_text(str(_find(file, search_paths))))):
        if isinstance(statement, Setting):
            settings.append(statement)
        elif isinstance(statement, config_parser.IncludeStatement):
            if included_by:
                raise ValueError(f"{file} is included by {included_by} and itself includes {statement.filename}; "
                                 "only one level of include is allowed.")
            _read_file(statement.filename, search_paths, settings, imports, included_by=file)
        elif isinstance(statement, config_parser.ImportStatement):
            if statement.module == "__gin__.dynamic_registration":
                raise ValueError(t5x_names.of_gin_file(file))
            imports.append(statement.format())


@functools.lru_cache(maxsize=256)  # the arms of a study read the same files
def _statements(file: str, content: str) -> tuple[Any, ...]:
    """The bindings of a gin file as settings, and its other statements."""
    found: list[Any] = []
    try:
        for statement in config_parser.ConfigParser(content, _AsWritten()):
            if isinstance(statement, config_parser.BindingStatement):
                scope = f"{statement.scope}/" if statement.scope else ""
                argument = f".{statement.arg_name}" if statement.arg_name else ""
                statement = Setting(f"{scope}{statement.selector}{argument}", repr(statement.value),
                                    f"{file}:{statement.location.line_num}")
            found.append(statement)
    except tokenize.TokenError as error:
        raise ValueError(f"{file}, line {error.args[1][0]}: {error.args[0]}; unclosed bracket or quote?") from None
    except SyntaxError as error:
        message, text = error.msg.splitlines()[0], (error.text or "").strip()
        raise ValueError(f"{file}, line {error.lineno}: {message}: {text}") from None
    return tuple(found)


def _inherited(settings: Sequence[Setting]) -> list[Setting]:
    """The settings inherited from the run or the published weights that INITIAL_CHECKPOINT_PATH, BRANCH_FROM
    or CHECKPOINT_PATH names: model size, vocabulary, row length and mesh. Any file or flag overrides them.

    Once the run has its own checkpoint, that holds the same settings, in case the other run is gone.
    """
    names = ("INITIAL_CHECKPOINT_PATH", "BRANCH_FROM", "CHECKPOINT_PATH", "MODEL_DIR")
    literals = {setting.name: ast.literal_eval(setting.value) for setting in settings
                if setting.name in names and setting.value[:1] in "'\"N"}
    trunk = (literals.get("BRANCH_FROM") or "").rpartition("@")[0]
    if not (parent := literals.get("INITIAL_CHECKPOINT_PATH") or trunk or literals.get("CHECKPOINT_PATH")):
        return []
    from codellm_jax.weights.start import newest_settings

    try:
        path, (step, saved) = parent, newest_settings(parent, training="CHECKPOINT_PATH" not in literals)
    except OSError:  # it is gone, or the network is down
        try:
            path, (step, saved) = literals["MODEL_DIR"], newest_settings(literals["MODEL_DIR"])
        except (FileNotFoundError, KeyError):
            path = ""
        if not path:
            raise
    return _taken_over(saved, settings, f"{path}, step {step}")


def _branch_step(settings: Sequence[Setting]) -> list[Setting]:
    """The step of BRANCH_FROM if BRANCH_STEP is used, or 0."""
    if not any("BRANCH_STEP" in references("%", setting.value) for setting in settings):
        return []
    named = [setting for setting in settings if setting.name == "BRANCH_FROM"][-1:]
    step = re.search(r"@(\d+)'$", named[0].value) if named else None
    return [Setting("BRANCH_STEP", step[1] if step else "0", named[0].where if step else "no BRANCH_FROM")]


def _taken_over(saved: Mapping[str, str], settings: Sequence[Setting], where: str) -> list[Setting]:
    """The settings of `saved` that a run starting from it inherits, where `settings` has none; literals only."""
    from codellm_jax.runtime.compatibility import VOCABULARY_SETTINGS, literal

    names = [name for name in saved if re.fullmatch(r"(model|mesh)\.\w+", name)]
    names += [f"vocabulary.{name}" for name in VOCABULARY_SETTINGS]
    used = {macro for setting in settings for macro in references("%", setting.value)}
    macros = {"VOCABULARY": "vocabulary.path", "TASK_FEATURE_LENGTHS": "mixture.lengths"}
    source = {name: name for name in names} | {macro: name for macro, name in macros.items() if macro in used}
    return [Setting(name, value, where) for name, at in source.items() if (value := literal(saved, at)) is not None]


def _find(file: str, search_paths: Sequence[str]) -> epath.Path:
    candidates = [epath.Path(file).expanduser(), *(epath.Path(folder).expanduser() / file for folder in search_paths),
                  epath.Path(SHIPPED) / file]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    if file.startswith("t5x/"):
        raise FileNotFoundError(t5x_names.of_gin_file(file))
    near = difflib.get_close_matches(file, list(shipped_gin_files()), n=3, cutoff=0.4)
    raise FileNotFoundError(f"No gin file {file}" + (f"; nearest shipped: {', '.join(near)}." if near else "."))


@functools.lru_cache(maxsize=4096)
def as_gin_value(text: str) -> str:
    """A flag's value in gin's syntax: a literal or reference unchanged, any other text as a string."""
    try:
        statements = list(config_parser.ConfigParser(f"value = {text}", _AsWritten()))
        if len(statements) == 1 and isinstance(statements[0], config_parser.BindingStatement):
            return repr(statements[0].value)
    except (SyntaxError, tokenize.TokenError):
        if text.startswith(tuple("[{(@%'\"")):
            raise ValueError(f"{text} looks like a list, reference or quoted string but is incomplete.") from None
    return repr(text)


def build(configuration: Configuration, name: str) -> Any:
    """Calls a configurable with all its bindings and returns the result.

    Raises:
      ValueError: in one line, if a parameter is missing.
    """
    require_types(configuration)
    gin.clear_config()
    _register(configuration)
    gin.parse_config("\n".join(configuration.imports))
    # A study's file also has settings of its runs, such as pretraining/BATCH_SIZE = 8.
    is_study = "study.directory" in configuration.effective
    for setting in configuration.effective.values():
        if not (is_study and "/" in setting.name):
            gin.bind_parameter(f"{setting.name}/gin.macro.value" if _is_macro(setting.name) else setting.name,
                               _gin_value(setting.value))
    return gin.get_configurable(name)()


@functools.lru_cache(maxsize=4096)  # the arms of a study share most of their values
def _gin_value(text: str) -> Any:
    return gin.config.parse_value(text)


def _register(configuration: Configuration) -> None:
    known = {name: target for name, target in CONFIGURABLES.items()}
    known |= {f"optax.{name}": f"optax:{name}" for name in _optax_names(configuration)}
    for name, target in known.items():
        module, attribute = target.split(":")
        if name not in _registered:
            scope, _, short = name.rpartition(".")
            gin.external_configurable(getattr(imported(module), attribute), short, module=scope or None)
            _registered.add(name)


_registered: set[str] = set()


def _optax_names(configuration: Configuration) -> set[str]:
    return {found for s in configuration.settings for found in re.findall(r"\boptax\.(\w+)", f"{s.name} {s.value}")}


def operative(configuration: Configuration) -> tuple[str, dict[str, str]]:
    """The operative configuration after `build`: every parameter used, with defaults, and the macros that they name.

    Returns:
      A gin file with the source of each value in a comment, and the same values as a dict.
    """
    effective = configuration.effective
    values = {name: setting.value for name, setting in effective.items() if _is_macro(name)}
    from_optax = _optax_names(configuration)
    for statement in config_parser.ConfigParser(gin.operative_config_str(max_line_length=10**6), _AsWritten()):
        if isinstance(statement, config_parser.BindingStatement) and statement.arg_name:
            scope = f"{statement.scope}/" if statement.scope else ""
            module = "optax." if statement.selector in from_optax else ""  # gin drops the prefix
            value = re.sub(r"@(\w+)", lambda found: f"@{'optax.' if found[1] in from_optax else ''}{found[1]}",
                           repr(statement.value))
            values[f"{scope}{module}{statement.selector}.{statement.arg_name}"] = value
    used = {macro for value in values.values() for macro in references("%", value)}
    values = {name: value for name, value in values.items() if not _is_macro(name) or name in used}
    lines = [*configuration.imports, *(
        f"{name} = {value}  # {effective[name].where if name in effective else 'default'}"
        for name, value in values.items())]
    return "\n".join(lines) + "\n", values


def explain(configuration: Configuration, name: str) -> str:
    """The source of a value and what it overrode, in a few lines. Raises ValueError for an unknown name."""
    history = [setting for setting in configuration.settings if setting.name == name]
    configurable, _, parameter = name.rpartition(".")
    if not history:
        if configurable in CONFIGURABLES and parameter in _parameters(configurable):
            default = _parameters(configurable)[parameter].default
            if default is inspect.Parameter.empty:
                return f"{name} is not set and has no default."
            return f"{name} is not set; its default is {default!r}."
        raise ValueError(f"Nothing is named {name!r}" + (t5x_names.of_setting(name) or nearest(name, [
            *configuration.effective, *(f"{c}.{p}" for c in CONFIGURABLES for p in _parameters(c))])))
    lines = [f"{name} = {history[-1].value}", f"  set by {history[-1].where}"]
    lines += [f"  overriding {setting.value} of {setting.where}" for setting in reversed(history[:-1])]
    for macro in references("%", history[-1].value):
        if macro in configuration.effective:
            setting = configuration.effective[macro]
            lines.append(f"  where {macro} = {setting.value}, set by {setting.where}")
    lines += [f"  used by {setting.name}" for setting in configuration.effective.values()
              if re.search(rf"%{re.escape(name)}\b", setting.value)]
    if name == "train.learning_rate":
        lines.append(f"  one of {', '.join(f'@{schedule}()' for schedule in LEARNING_RATES)}")
    return "\n".join(lines)


def _require_known_names(configuration: Configuration) -> None:
    effective = configuration.effective
    used = {macro for setting in effective.values() for macro in references("%", setting.value)}
    # A macro that a file used and a later file overrode is not a mistake.
    ever_used = {macro for setting in configuration.settings for macro in references("%", setting.value)}
    for macro in sorted(used - set(effective)):
        user = next(setting for setting in effective.values() if f"%{macro}" in setting.value)
        start = next((name for name in ("INITIAL_CHECKPOINT_PATH", "CHECKPOINT_PATH") if name in effective), None)
        raise ValueError(f"{user.where}: {user.name} needs {macro}, which no file or flag sets; "
                         f"give --gin.{macro}=VALUE" + (f", or name a run in {start}." if start else "."))
    for name, setting in effective.items():
        selector, _, parameter = name.split("/")[-1].rpartition(".")
        # A macro of a study: checked when its runs are read.
        known = name in ever_used or "study.directory" in effective if _is_macro(name) else \
            selector in CONFIGURABLES and parameter in _parameters(selector)
        if not known and (theirs := t5x_names.of_setting(name)) and not configuration.imports:
            raise ValueError(f"{setting.where}: nothing is named {name}{theirs}")
        if _is_macro(name):
            if not known:
                raise ValueError(f"{setting.where}: nothing uses the setting {name}" + nearest(name, used))
        elif selector in CONFIGURABLES:
            if parameter not in _parameters(selector):
                raise ValueError(f"{setting.where}: {selector} has no parameter {parameter!r}"
                                 + nearest(parameter, _parameters(selector)))
        else:
            _require_known_selector(selector, setting, configuration)
    for setting in effective.values():
        for reference in references("@", setting.value):
            _require_known_selector(reference.split("/")[-1], setting, configuration)


def _require_known_selector(selector: str, setting: Setting, configuration: Configuration) -> None:
    if selector.startswith("optax."):
        import optax

        name = selector.removeprefix("optax.")
        if name in CONFIGURABLES:
            raise ValueError(f"{setting.where}: optax's own {name} takes arguments that an optimizer here does not "
                             f"get; use @{name}, or @chain with chain.transformations (see docs/settings.md).")
        if not hasattr(optax, name):
            raise ValueError(f"{setting.where}: optax has no {name!r}" + nearest(name, dir(optax)))
    elif selector not in CONFIGURABLES and not configuration.imports:
        raise ValueError(f"{setting.where}: nothing is named {selector!r}" + (
            t5x_names.of_setting(selector) or nearest(selector, CONFIGURABLES)))


def require_types(configuration: Configuration) -> None:
    """Raises ValueError if a literal is bound to a parameter of another type."""
    effective = configuration.effective
    for name, setting in effective.items():
        selector, _, parameter = name.split("/")[-1].rpartition(".")
        if selector not in CONFIGURABLES:
            continue
        source = setting
        while re.fullmatch(r"%\w+", source.value):
            source = effective[source.value[1:]]
        try:
            value = ast.literal_eval(source.value)
        except (ValueError, SyntaxError):
            continue  # a reference, or a container of references
        wanted = _types(selector).get(parameter, Any)
        if not _fits(value, wanted):
            readable = str(wanted).replace("typing.", "").replace("collections.abc.", "").removeprefix("<class '")
            raise ValueError(f"{source.where}: {source.name} must be of type {readable.removesuffix(chr(39) + '>')}, "
                             f"found {value!r}.")


def _fits(value: Any, wanted: Any) -> bool:
    origin = typing.get_origin(wanted) or wanted
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in typing.get_args(wanted))
    if wanted is Any or isinstance(wanted, typing.TypeVar):
        return True
    if origin in (int, float):
        return not isinstance(value, bool) and isinstance(value, (int, float) if origin is float else int)
    if origin is Sequence:
        return isinstance(value, (list, tuple)) and all(_fits(v, (*typing.get_args(wanted), Any)[0]) for v in value)
    if origin is Mapping:
        kinds = (*typing.get_args(wanted), Any, Any)
        return isinstance(value, dict) and all(_fits(k, kinds[0]) and _fits(v, kinds[1]) for k, v in value.items())
    return isinstance(value, origin) if isinstance(origin, type) else True


def _is_macro(name: str) -> bool:
    return "." not in name


@functools.cache
def _parameters(configurable: str) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(_target(configurable)).parameters


@functools.cache
def _types(configurable: str) -> Mapping[str, Any]:
    return typing.get_type_hints(_target(configurable))


def _target(configurable: str) -> Callable[..., Any]:
    module, attribute = CONFIGURABLES[configurable].split(":")
    return getattr(imported(module), attribute)


def imported(module: str) -> types.ModuleType:
    """A module by name. Raises ValueError if another module named `tasks` shadows ours."""
    if module.split(".")[0] == "tasks":
        own = Path(__file__).resolve().parent.parent / "tasks"
        found = importlib.util.find_spec("tasks")
        where = None if found is None else found.origin or next(iter(found.submodule_search_locations or ()), None)
        if where is None or Path(where).resolve().parent != own:
            raise ValueError(f"{where or 'nothing'} shadows this package's module `tasks` in {own}: run the command "
                             f"from another folder, remove that one from PYTHONPATH, or rename "
                             "it.")
    return importlib.import_module(module)
