#!/usr/bin/env bash
# The tour: from raw text to a model that is aligned, quantized and examined, on two cores, without a
# network, in some 15 to 20 minutes. Each stage is a command of the project at smaller settings; the
# number that it reached is printed beside the range that it should lie in (tour.py). A stage that
# fails ends the tour with its reason; run again, the tour goes on from there.
#
#     bash tour.sh        the tour; its page is runs/tour/report.md
#     bash tour.sh 1      the same with another seed, as tour-1
set -euo pipefail
seed=${1:-0}
it=tour$([ "$seed" = 0 ] || echo "-$seed")
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if ! [[ $seed =~ ^[0-9]{1,6}$ ]]; then
    echo "tour.sh: the seed '$seed' must be a whole number" >&2
    exit 2
fi
mkdir -p "runs/$it"

stage() { # its name, then the command
    local name=$1 log="runs/$it/$1.txt" began=$SECONDS
    shift
    if [ -e "runs/$it/$name.json" ]; then
        echo "== $name: done"
        return
    fi
    if [ -e "$log" ]; then # begun by a tour that was stopped
        rm -rf "runs/$it-$name"
    fi
    printf '\n== %s: python %s\n' "$name" "$*"
    if ! python "$here/$1" "${@:2}" 2>&1 | tee "$log"; then
        printf '\nThe tour ends at the stage "%s" (all it said: %s). The same command goes on from there.\n' \
            "$name" "$log" >&2
        exit 1
    fi
    python "$here/tour.py" "$name" --tour "$it" --seconds $((SECONDS - began))
}

sums=(--tasks add --levels 2 3)

# Raw text is dirty: see what cleaning takes from Python's own documentation, and how rows are packed.
stage text data.py

# A base model: documentation, stories of a small world, its facts, and questions about them.
stage base train.py --name "$it-base" --data.mix prose=@1 stories=world:@1 facts=facts:@2 quiz=quiz:4000@1 \
    --model.dim 96 --model.layers 3 --model.context 256 --tokenizer.vocab-size 1024 --batch 16 \
    --steps 400 --seed "$seed"

# It goes on with whatever it is given; tuned on conversations, it answers, with its steps or at once.
stage sft align.py sft --base "$it-base" --name "$it-sft" --lessons.tasks add "look up" absent add add add \
    --lessons.levels 2 3 --lessons.unasked --lessons.turns 1 --lessons.seed "$seed" --batch 16 --steps 700 \
    --examined add "look up" --asked 40 --wording known --seed "$seed"

# People compare its answers, and a reward model learns what they like.
stage reward align.py reward --name "$it-reward" --run "$it-sft" "${sums[@]}" --count 1500 --seed "$seed"

# PPO moves it towards what the reward model likes, not too far: KL has a price.
stage ppo align.py ppo --name "$it-ppo" --run "$it-sft" --reward "$it-reward" "${sums[@]}" --beta 0.1 \
    --also "look up" absent --steps 25 --asked 50 --tokens 128 --seed "$seed"

# A new task by few weights: LoRA beside the frozen model.
stage lora align.py sft --base "$it-ppo" --name "$it-lora" --adapter.kind lora --adapter.rank 16 \
    --adapter.on "*" --lessons.tasks copy --lessons.levels 1 2 --lessons.count 4000 --lessons.turns 1 \
    --lessons.think 0 --steps 400 --batch 16 --examined copy --asked 40 --wording known --seed "$seed"

# Four bits a weight instead of 32, each rounding mended by the weights behind it.
stage quant quant.py save --run "$it-ppo" --name "$it-quant" --method gptq --bits 4 --group 32

# One model, asked for sums at once and step by step: thinking pays.
stage thought emergence.py thought --digits 2 3 4 --steps 700 --asked 60 --seed "$seed"

# What has come of it: the aligned model, in four bits, examined.
stage examined examine.py --run "$it-quant" "${sums[@]}" --wording known --count 60 --tokens 160 \
    --seed "$seed"

# And asked.
question="What is 27 plus 58?"
printf '\n== a question to the final model: %s\n' "$question"
{
    printf '%s\n' "$question"
    printf '%s\n' "$question" | python "$here/generate.py" --run "$it-quant" --chat
} | tee "runs/$it/answer.txt"
python "$here/tour.py" report --tour "$it"
