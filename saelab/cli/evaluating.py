"""`saelab evaluate`."""

from saelab.cli import options
from saelab.cli.opening import open_pair
from saelab.cli.saying import say
from saelab.cli.texts import count_overlap, read_head, read_tail
from saelab.evaluation.evaluation import evaluate
from saelab.evaluation.saebench import save_saebench
from saelab.lm.tokens import Tokens
from saelab.stores.provenance import Provenance

N_TOKENS = 100_000
BASELINES, N_BOOTSTRAP, SEED = (options.default_of(evaluate, name) for name in ("baselines", "n_bootstrap", "seed"))


def evaluate_sae(
    sae: options.SAEName,
    model: options.ModelName,
    text: options.TextFile,
    n_tokens: options.EvalTokens = N_TOKENS,
    ctx_len: options.EvalCtxLen = None,
    from_start: options.FromStart = False,
    json: options.JSONFile = None,
    saebench: options.SAEBenchFile = None,
    baselines: options.Baselines = BASELINES,
    n_bootstrap: options.Draws = N_BOOTSTRAP,
    seed: options.EvalSeed = SEED,
    allow_mismatch: options.AllowMismatch = False,
    separator: options.Separator = options.SEPARATOR,
    field: options.Field = options.FIELD,
    bos: options.Bos = True,
    device: options.Device = None,
    progress: options.Progress = True,
) -> None:
    """Evaluate an SAE in its language model, beside its baselines.

    Documents are taken from the END of the text, the last one first, because `collect` reads from the start. A warning
    says so when an evaluated document was trained on nevertheless, as far as the two file names tell.
    """
    coder, lm = open_pair(sae, model, device, progress)
    origin = coder.provenance
    length = ctx_len or (origin.ctx_len if origin else None) or options.CTX_LEN
    if from_start:
        tokens, n_before = read_head(lm, text, n_tokens, length, bos, separator, field), 0
    else:
        tokens, n_before = read_tail(lm, text, n_tokens, length, bos, separator, field)
    _announce(tokens, n_before, origin)
    result = evaluate(
        coder,
        lm,
        tokens,
        baselines=baselines,
        n_bootstrap=n_bootstrap,
        seed=seed,
        allow_mismatch=allow_mismatch,
        progress=progress,
    )
    say(str(result))
    if json is not None:
        result.save(json)
    if saebench is not None:
        save_saebench(result, saebench, coder)


def _announce(tokens: Tokens, n_before: int, origin: Provenance | None) -> None:
    """Say on stderr what is evaluated on, and how much of it the SAE has seen."""
    if origin and (n_both := count_overlap(tokens, n_before, origin.text)):
        say(f"warning: the SAE was trained on {n_both:,} of these documents ({origin.text}).", err=True)
    say(f"Evaluating on {tokens.n_tokens:,} tokens of {tokens.source}.", err=True)
