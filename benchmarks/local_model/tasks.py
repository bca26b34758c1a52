"""Small tasks with computed truth: eighteen whose transcripts were read while the prompt was worked on."""

import random
from collections.abc import Callable

from benchmarks.local_model.task import CITIES, NAMES, Task, hidden
from benchmarks.local_model.unseen import unseen
from rlm_core.demo.task import load_text


def tuning() -> list[Task]:
    rng = random.Random(1)
    return [_errors(rng), _apples(rng), _code(rng), _warmest(rng), _reviews(rng), _visitors(rng)]


def held_out() -> list[Task]:
    rng = random.Random(2)
    return [_rain(rng), _average(rng), _keeper(rng), _status(rng), _complaints(rng), _chapter(rng)]


def fresh() -> list[Task]:
    """Of other forms than the tasks above."""
    rng = random.Random(3)
    return [_longest(rng), _shop(rng), _two_steps(rng), _both(rng), _animals(rng), _between(rng)]


def _errors(rng: random.Random) -> Task:
    levels = rng.choices(["INFO", "DEBUG", "WARNING", "ERROR"], [6, 3, 2, 1], k=2_000)
    lines = [
        f"2024-03-{n % 28 + 1:02} {level} worker {n % 7} finished step {n}" for n, level in enumerate(levels)
    ]
    question = "How many lines of this log have the level ERROR? Answer with the number."
    return Task("errors in a log", question, "\n".join(lines), str(levels.count("ERROR")))


def _apples(rng: random.Random) -> Task:
    orders = [(rng.choice(["apple", "pear", "plum"]), rng.randint(1, 9)) for _ in range(900)]
    lines = [f"order {n}: {count} x {fruit}" for n, (fruit, count) in enumerate(orders)]
    question = "How many apples were ordered in all orders together? Answer with the number."
    truth = sum(count for fruit, count in orders if fruit == "apple")
    return Task("apples in orders", question, "\n".join(lines), str(truth))


def _code(rng: random.Random) -> Task:
    question = "What is the code of the vault? Answer with the number."
    return Task("a code in a long text", question, hidden(rng, "The code of the vault is 48213."), "48213")


def _warmest(rng: random.Random) -> Task:
    days = [(rng.choice(CITIES), rng.randint(-10, 34)) for _ in range(700)]
    days.insert(400, ("Dakar", 39))
    lines = [f"day {n}; {city}; {degrees} degrees" for n, (city, degrees) in enumerate(days)]
    return Task(
        "the warmest city",
        "Which city had the highest temperature? Answer with its name.",
        "\n".join(lines),
        "Dakar",
    )


GOOD = (
    "I loved every minute of it, what a wonderful film.",
    "A masterpiece. The best acting I have seen in years.",
    "Charming, funny and warm; we laughed and left happy.",
)
BAD = (
    "A dull waste of two hours, I nearly fell asleep.",
    "Terrible script, terrible acting, avoid it.",
    "I hated it and asked for my money back.",
)


def _reviews(rng: random.Random) -> Task:
    reviews = [rng.choice(GOOD if good else BAD) for good in rng.choices([True, False], k=14)]
    text = "\n\n".join(f"Review {n}: {review}" for n, review in enumerate(reviews, 1))
    question = (
        "How many of these reviews are positive? Let llm_query read each review. Answer with the number."
    )
    return Task("positive reviews", question, text, str(sum(review in GOOD for review in reviews)))


def _visitors(rng: random.Random) -> Task:
    visitors = [f"{rng.choice(NAMES)}-{rng.randint(1, 40)}" for _ in range(800)]
    lines = [f"visit {n} by user {visitor}" for n, visitor in enumerate(visitors)]
    question = "How many different users visited? Answer with the number."
    return Task("different visitors", question, "\n".join(lines), str(len(set(visitors))))


def _rain(rng: random.Random) -> Task:
    days = [(rng.choice(["sun", "rain", "snow", "fog"]), rng.randint(1, 30)) for _ in range(1_500)]
    lines = [f"{n:04} | weather={kind} | wind={wind} km/h" for n, (kind, wind) in enumerate(days)]
    truth = sum(kind == "rain" and wind > 20 for kind, wind in days)
    question = "On how many days was there rain and a wind of more than 20 km/h? Answer with the number."
    return Task("rain and wind", question, "\n".join(lines), str(truth))


def _average(rng: random.Random) -> Task:
    scores = [(rng.choice(NAMES), rng.randint(10, 99)) for _ in range(600)]
    lines = [f"exam {n}, student {name}, {score} points" for n, (name, score) in enumerate(scores)]
    own = [score for name, score in scores if name == "Hana"]
    question = "How many points did Hana get on average? Answer with the number, rounded to one decimal."
    return Task("an average", question, "\n".join(lines), f"{sum(own) / len(own):.1f}")


def _keeper(rng: random.Random) -> Task:
    text = hidden(rng, "The keeper of the lighthouse was called Goran, and he lived there for 31 years.")
    return Task(
        "a name in a long text",
        "What was the keeper of the lighthouse called? Answer with the name.",
        text,
        "Goran",
    )


def _status(rng: random.Random) -> Task:
    codes = rng.choices(["200", "404", "500", "301", "503"], [9, 5, 3, 4, 2], k=1_200)
    lines = [f'10.0.{n % 250}.7 "GET /page/{n}" -> {code}' for n, code in enumerate(codes)]
    question = "Which status code is the second most frequent in this log? Answer with the code."
    truth = sorted(set(codes), key=codes.count)[-2]
    return Task("the second status", question, "\n".join(lines), truth)


ANGRY = (
    "My parcel arrived broken and nobody answers my calls.",
    "You charged me twice, I want my money back now.",
    "Three weeks late again. This is not acceptable.",
)
CALM = (
    "Thank you, the chair looks great in our kitchen.",
    "Could you tell me your opening hours on Sunday?",
    "I would like to order two more of the same lamps.",
)


def _complaints(rng: random.Random) -> Task:
    letters = [rng.choice(ANGRY if angry else CALM) for angry in rng.choices([True, False], k=12)]
    text = "\n---\n".join(letters)
    question = (
        "How many of these messages are complaints? Let llm_query read each message. Answer with the number."
    )
    return Task("complaints", question, text, str(sum(letter in ANGRY for letter in letters)))


def _chapter(rng: random.Random) -> Task:
    verses = load_text().splitlines()[:900]
    chapters = ["\n".join(verses[start : start + 30]) for start in range(0, 900, 30)]
    chosen = rng.randint(12, 25)
    chapters[chosen - 1] += "\nAnd they found a bicycle in the field."
    text = "\n\n".join(f"CHAPTER {n}\n{chapter}" for n, chapter in enumerate(chapters, 1))
    return Task(
        "which chapter",
        "In which chapter does the word bicycle occur? Answer with its number.",
        text,
        str(chosen),
    )


def _longest(rng: random.Random) -> Task:
    trips = [(rng.choice(NAMES), rng.randint(20, 400)) for _ in range(500)]
    trips.insert(311, ("Emeka", 455))
    lines = [f"{name} drove {km} km on trip {n}" for n, (name, km) in enumerate(trips)]
    question = "Who drove the longest trip? Answer with the name."
    return Task("the longest trip", question, "\n".join(lines), "Emeka")


def _shop(rng: random.Random) -> Task:
    sales = [(rng.randint(1, 9), rng.randint(2, 60)) for _ in range(400)]
    lines = ["id,count,price", *(f"{n},{count},{price}" for n, (count, price) in enumerate(sales))]
    question = "What is the sum of count times price over all rows of this CSV? Answer with the number."
    return Task("a sum of products", question, "\n".join(lines), str(sum(a * b for a, b in sales)))


def _two_steps(rng: random.Random) -> Task:
    text = hidden(rng, "The red house belongs to the baker.")
    lines = text.splitlines()
    lines.insert(len(lines) // 5, "The name of the baker is Dalia.")
    question = "What is the name of the owner of the red house? Answer with the name."
    return Task("two steps", question, "\n".join(lines), "Dalia")


def _both(rng: random.Random) -> Task:
    first, second = (sorted(rng.sample(range(1_000), 300)) for _ in range(2))
    context = f"LIST A\n{', '.join(map(str, first))}\n\nLIST B\n{', '.join(map(str, second))}"
    question = "How many numbers are in both list A and list B? Answer with the number."
    return Task("in both lists", question, context, str(len(set(first) & set(second))))


ANIMALS = (
    "Our dog sleeps all day beside the stove.",
    "Two swallows have built a nest below the roof.",
    "The mare gave birth to a foal last night.",
)
OTHERS = (
    "The train to the coast was late again.",
    "She painted the kitchen in a pale green.",
    "Bread has become more expensive since spring.",
)


def _animals(rng: random.Random) -> Task:
    notes = [rng.choice(ANIMALS if animal else OTHERS) for animal in rng.choices([True, False], k=13)]
    question = (
        "How many of these notes, one a line, are about animals? Let llm_query read each. "
        "Answer with the number."
    )
    return Task(
        "notes about animals", question, "\n".join(notes), str(sum(note in ANIMALS for note in notes))
    )


def _between(rng: random.Random) -> Task:
    lines = [f"entry {rng.randint(1000, 9999)}" for _ in range(900)]
    start, end = sorted(rng.sample(range(50, 850), 2))
    lines[start], lines[end] = "== START ==", "== END =="
    question = (
        "How many lines are between the line == START == and the line == END ==? Answer with the number."
    )
    return Task("between two lines", question, "\n".join(lines), str(end - start - 1))


SETS: dict[str, Callable[[], list[Task]]] = {
    "tuning": tuning,
    "held-out": held_out,
    "fresh": fresh,
    "unseen": unseen,
}
