"""What the README says is so: its code runs, commands and links exist, its signature is ours."""

import ast
import inspect
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from jax_flash2 import attention

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def blocks(language, text=README):
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def section(title):
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", README, re.DOTALL | re.MULTILINE)[1]


def run(script, cwd):
    done = subprocess.run(
        [sys.executable, "-P", "-c", script], cwd=cwd, text=True, capture_output=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_code_runs(tmp_path):
    plain, module = blocks("python")
    shapes = "print(out.shape, dq.shape, dk.shape, dv.shape)"
    q, k = "(2, 4096, 8, 64)", "(2, 4096, 2, 64)"
    assert run(plain + shapes, tmp_path).strip() == f"{q} {q} {k} {k}"
    shapes = "print(out.shape, prompt.shape, token.shape, layer.cache_index[...])"
    whole, one = "(2, 128, 512)", "(2, 1, 512)"
    assert run(module + shapes, tmp_path).strip() == f"{whole} {whole} {one} [129 129]"


@pytest.mark.parametrize("title", ["Quickstart", "Tests"])
def test_a_section_is_one_command_that_exists(title):
    (command,) = blocks("bash", section(title))
    assert len(command.splitlines()) == 1
    for extra in re.findall(r"\.\[(\w+)\]", command):
        assert extra in PYPROJECT["project"]["optional-dependencies"]
    for path in re.findall(r"\S+\.py", command):
        assert (ROOT / path).is_file()


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("https://"):
            assert (ROOT / target).exists(), target


def test_signature():
    (block,) = [b for b in blocks("") if b.startswith("attention(")]
    written = ast.parse(f"def {block.strip()}: ...").body[0].args
    defaults = [ast.literal_eval(x) for x in written.kw_defaults]
    parameters = inspect.signature(attention).parameters.values()
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    keyword = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    assert [x.arg for x in written.args] == positional
    assert dict(zip((x.arg for x in written.kwonlyargs), defaults, strict=True)) == keyword


def test_versions_are_those_of_the_package():
    python = PYPROJECT["project"]["requires-python"].removeprefix(">=")
    jax = next(d for d in PYPROJECT["project"]["dependencies"] if d.startswith("jax>="))
    assert f"Python {python} or newer, jax {jax.removeprefix('jax>=')} or newer" in README
    extras = PYPROJECT["project"]["optional-dependencies"]
    (flax,) = extras["flax"]
    assert flax in extras["examples"]
    assert f"flax {flax.removeprefix('flax>=')} or newer" in README


def test_build_variables_exist():
    cmake = "".join(path.read_text() for path in [*ROOT.glob("cmake/*"), ROOT / "CMakeLists.txt"])
    variables = re.findall(r"^\| `(JAX_FLASH2_\w+)`", README, re.MULTILINE)
    assert len(variables) >= 3
    assert all(variable in cmake for variable in variables)


def test_what_it_says_of_sharding(tmp_path):
    script = """if True:
        import os, re
        os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
        os.environ["JAX_PLATFORMS"] = "cpu"
        import jax, jax.numpy as jnp
        from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
        from jax_flash2 import attention

        def loss(q):
            return jnp.square(attention(q, q, q, is_causal=True)).sum(axis=(1, 2, 3))

        def gradient(f, q):
            return jax.jit(jax.grad(lambda q: f(q).sum())).lower(q).compile()

        mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))
        x = jax.random.normal(jax.random.key(0), (4, 33, 2, 16))
        sharded = jax.device_put(x, NamedSharding(mesh, P("x")))
        expected = gradient(loss, x)(x)
        by_shard = jax.shard_map(
            loss, mesh=mesh, in_specs=P("x"), out_specs=P("x")
        )
        for f in (loss, by_shard):
            compiled = gradient(f, sharded)
            assert jnp.allclose(compiled(sharded), expected, atol=1e-5)
            print(len(re.findall("all-gather", compiled.as_text())) > 0)
    """
    assert run(script, tmp_path).split() == ["False", "False"]
