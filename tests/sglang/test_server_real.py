"""The server manager with the real server: ready, refused, killed, and nothing left behind."""

import urllib.error

import pytest


def test_a_server_answers_in_ids_under_its_key_only(server):
    reply = server.call("/generate", {"input_ids": [5, 6, 7], "sampling_params": {"max_new_tokens": 4}})
    assert len(reply["output_ids"]) == 4
    request = urllib.request.Request(f"{server.url}/generate", data=b"{}")
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(request, timeout=10)


def test_experts(moe_server):
    reply = moe_server.call(
        "/generate", {"input_ids": [5, 6, 7], "sampling_params": {"max_new_tokens": 4}, "return_routed_experts": True}
    )
    assert reply["meta_info"]["routed_experts"]
    moe_server.restore()
