"""Is an answer right? Rules of the test sets, math-verify, and a verifier model behind a URL. No torch."""
