"""The page's JSDoc, checked by TypeScript."""

import shutil
import subprocess

import pytest

from decomp_jax.room import http

TSC = shutil.which("tsc")


@pytest.mark.skipif(TSC is None, reason="the page's types were NOT CHECKED: no tsc here; npm install -g typescript@7")
def test_the_page_is_well_typed():
    options = "--noEmit --allowJs --checkJs --strict --target es2022 --lib es2023,dom,dom.iterable"
    done = subprocess.run([TSC, *options.split(), "--moduleResolution", "bundler", http.STATIC / "main.js"],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
