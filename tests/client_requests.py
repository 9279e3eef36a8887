"""What Kobold Lite and SillyTavern send, written after their public sources.

Kobold Lite: its page as served by KoboldCPP 1.104 (`finalize_submit_payload`, `get_kobold_header`, their callers).
SillyTavern: `src/endpoints/backends/kobold.js` and `text-completions.js`, `public/scripts/textgen-settings.js`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

REPLY_TOKENS = 12
STORY = "\n### Instruction:\nTell me of the sea.\n### Response:\n"

_LITE_SAMPLERS = {
    "n": 1,
    "max_context_length": 2048,
    "max_length": REPLY_TOKENS,
    "rep_pen": 1.0,
    "temperature": 0.01,
    "top_p": 0.92,
    "top_k": 1,
    "top_a": 0,
    "typical": 1,
    "tfs": 1,
    "rep_pen_range": 360,
    "rep_pen_slope": 0.7,
    "sampler_order": [6, 0, 1, 3, 4, 2, 5],
    "memory": "",
    "trim_stop": True,
    "genkey": "KCPP4711",
    "min_p": 0,
    "dynatemp_range": 0,
    "dynatemp_exponent": 1,
    "smoothing_factor": 0,
    "smoothing_curve": 1,
    "nsigma": 0,
    "banned_tokens": [],
    "render_special": False,
    "logprobs": False,
    "replace_instruct_placeholders": True,
    "presence_penalty": 0,
    "logit_bias": {},
    "stop_sequence": ["{{[INPUT]}}", "{{[OUTPUT]}}"],
    "use_default_badwordsids": False,
    "bypass_eos": False,
    "prompt": STORY,
}
_TAVERN_CLASSIC = {
    "prompt": STORY,
    "use_story": False,
    "use_memory": False,
    "use_authors_note": False,
    "use_world_info": False,
    "max_context_length": 2048,
    "max_length": REPLY_TOKENS,
    "rep_pen": 1.0,
    "rep_pen_range": 0,
    "rep_pen_slope": 0.9,
    "temperature": 0.01,
    "tfs": 1,
    "top_a": 0,
    "top_k": 1,
    "top_p": 1,
    "min_p": 0,
    "typical": 1,
    "sampler_order": [6, 0, 1, 3, 4, 2, 5],
    "singleline": False,
    "use_default_badwordsids": False,
    "mirostat": 0,
    "mirostat_eta": 0.1,
    "mirostat_tau": 5,
    "stop_sequence": ["\n### Instruction:"],
}
_TAVERN_TEXT = {
    "prompt": STORY,
    "model": "",
    "max_new_tokens": REPLY_TOKENS,
    "max_tokens": REPLY_TOKENS,
    "n_predict": REPLY_TOKENS,
    "num_predict": REPLY_TOKENS,
    "num_ctx": 2048,
    "temperature": 0.01,
    "top_p": 1,
    "typical_p": 1,
    "typical": 1,
    "sampler_seed": 1,
    "seed": 1,
    "min_p": 0,
    "repetition_penalty": 1,
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "top_k": 1,
    "min_length": 0,
    "add_bos_token": True,
    "smoothing_factor": 0,
    "smoothing_curve": 1,
    "dry_allowed_length": 2,
    "dry_multiplier": 0,
    "dry_base": 1.75,
    "dry_sequence_breakers": ["\n", ":", '"', "*"],
    "dry_penalty_last_n": 0,
    "stopping_strings": ["\n### Instruction:"],
    "stop": ["\n### Instruction:"],
    "truncation_length": 2048,
    "ban_eos_token": False,
    "skip_special_tokens": True,
    "include_reasoning": True,
    "top_a": 0,
    "tfs": 1,
    "mirostat_mode": 0,
    "mirostat_tau": 5,
    "mirostat_eta": 0.1,
    "custom_token_bans": "",
    "banned_strings": [],
    "api_type": "koboldcpp",
    "api_server": "http://127.0.0.1:5001/",
    "sampler_order": [6, 0, 1, 3, 4, 2, 5],
    "xtc_threshold": 0.1,
    "xtc_probability": 0,
    "nsigma": 0,
    "rep_pen": 1,
    "rep_pen_range": 0,
    "guidance_scale": 1,
    "negative_prompt": "",
    "trim_stop": True,
}


@dataclass(frozen=True)
class Request:
    """One request of a program.

    Attributes:
        program: who sends it: `lite` from a page that the endpoint itself served, `tavern` from node-fetch.
        body: None for a GET, the empty mapping for a POST without one.
        is_streamed: whether the reply comes as events.
    """

    program: str
    path: str
    body: Mapping[str, Any] | None = field(default=None, repr=False)
    is_streamed: bool = False

    def raw(self, port: int) -> bytes:
        """Return the bytes on the wire."""
        authority = f"127.0.0.1:{port}"
        headers = {"Host": authority, **(_lite(authority) if self.program == "lite" else _tavern())}
        content = json.dumps(self.body).encode() if self.body else b""
        if self.body is not None:
            headers["Content-Length"] = str(len(content))
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        method = "GET" if self.body is None else "POST"
        return f"{method} {self.path} HTTP/1.1\r\n{head}\r\n".encode() + content


def _lite(authority: str) -> dict[str, str]:
    return {
        "Connection": "close",
        "User-Agent": "Mozilla/5.0 (Macintosh; Intel Mac OS X 10_15_7) AppleWebKit/605.1.15 (KHTML, like Gecko)",
        "Content-Type": "application/json",
        "Accept": "*/*",
        "Origin": f"http://{authority}",
        "Sec-Fetch-Site": "same-origin",
        "Sec-Fetch-Mode": "cors",
        "Sec-Fetch-Dest": "empty",
        "Referer": f"http://{authority}/",
        "Accept-Encoding": "gzip, deflate, br, zstd",
        "Accept-Language": "en-GB,en;q=0.9",
    }


def _tavern() -> dict[str, str]:
    return {
        "Content-Type": "application/json",
        "User-Agent": "node-fetch",
        "Accept": "*/*",
        "Accept-Encoding": "gzip, deflate, br",
        "Connection": "close",
    }


LITE = (
    Request("lite", "/"),
    Request("lite", "/api/v1/model"),
    Request("lite", "/api/v1/info/version"),
    Request("lite", "/api/extra/version"),
    Request("lite", "/api/extra/true_max_context_length"),
    Request("lite", "/api/extra/preloadstory"),
    Request("lite", "/api/v1/generate", _LITE_SAMPLERS),
    Request("lite", "/api/extra/generate/stream", _LITE_SAMPLERS, is_streamed=True),
    Request("lite", "/api/extra/generate/check", {"genkey": "KCPP4711"}),
    Request("lite", "/api/extra/last_logprobs", {"genkey": "KCPP4711"}),
    Request("lite", "/api/extra/tokencount", {"prompt": STORY}),
    Request("lite", "/api/extra/abort", {"genkey": "KCPP4711"}),
)
TAVERN = (
    Request("tavern", "/api/v1/info/version"),
    Request("tavern", "/api/extra/version"),
    Request("tavern", "/api/v1/model"),
    Request("tavern", "/v1/models"),
    Request("tavern", "/props"),
    Request("tavern", "/api/extra/tokencount", {"prompt": STORY}),
    Request("tavern", "/api/v1/generate", _TAVERN_CLASSIC),
    Request("tavern", "/api/extra/generate/stream", _TAVERN_CLASSIC, is_streamed=True),
    Request("tavern", "/v1/completions", {**_TAVERN_TEXT, "stream": False}),
    Request("tavern", "/v1/completions", {**_TAVERN_TEXT, "stream": True}, is_streamed=True),
    Request("tavern", "/api/extra/abort", {}),
)
