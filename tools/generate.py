"""Continue a prompt with a trained model: python tools/generate.py runs/tiny --prompt "In the beginning"."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megalite.checkpoint.folder import find


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("model", help="run folder, or one of its checkpoints/step-NNNNNNNN")
    parser.add_argument("--prompt", default="", help="text to continue; empty: begin a document")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="keep the K likeliest tokens; 0: all")
    parser.add_argument(
        "--top-p", type=float, default=0.95, metavar="P", help="keep the likeliest of total probability P"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    options = parser.parse_args()
    try:
        find(options.model)  # before torch is imported
        from megalite.data.tokenizer import stream_decode
        from megalite.generate import generate, load_model

        model, tokenizer, config = load_model(options.model, options.device)
        # documents are joined by the end-of-document token, so a text begins after one
        start = [tokenizer.eos_id] if tokenizer.eos_id is not None else []
        prompt = start + tokenizer.encode(options.prompt)
        room = config.train.seq_len - len(prompt)
        if options.max_new_tokens > room:
            print(
                f"note: the model was trained on {config.train.seq_len} tokens; beyond it gets worse", file=sys.stderr
            )
        ids = generate(
            model,
            prompt,
            options.max_new_tokens,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            eos_id=tokenizer.eos_id,
            seed=options.seed,
        )
        print(options.prompt, end="", flush=True)
        for text in stream_decode(tokenizer, ids):
            print(text, end="", flush=True)
        print()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
