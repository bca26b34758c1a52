"""Twelve tasks that were written after the last work on the prompt, of the kinds that it was worked on with.

Whoever works on the prompt must not read their transcripts, and writes new ones afterwards.
"""

import random
from collections import Counter

from benchmarks.local_model.task import CITIES, NAMES, Task, hidden

GLAD = (
    "We had such a lovely week by the lake, the children still talk about it.",
    "I got the job! I could dance through the whole house.",
    "The baby was born on Friday, healthy and with a loud voice.",
)
SAD = (
    "Grandmother died on Monday, and the house is so quiet now.",
    "The storm has taken our roof and the whole harvest.",
    "He has not written for a year, and I have stopped waiting.",
)


def unseen() -> list[Task]:
    rng = random.Random(4)
    return [
        _storms(rng),
        _payments(rng),
        _locker(rng),
        _captain(rng),
        _tallest(rng),
        _cheapest(rng),
        _commonest(rng),
        _plates(rng),
        _letters(rng),
        _older(rng),
        _arrival(rng),
        _mean(rng),
    ]


def _storms(rng: random.Random) -> Task:
    weather = rng.choices(["calm", "breeze", "storm", "fog"], [5, 4, 2, 1], k=1_400)
    lines = [f"log entry {n}: {each}, course {rng.randint(0, 359)}" for n, each in enumerate(weather)]
    question = "How many log entries say storm? Answer with the number."
    return Task("storms at sea", question, "\n".join(lines), str(weather.count("storm")))


def _payments(rng: random.Random) -> Task:
    payments = [(rng.choice(NAMES), rng.randint(5, 300)) for _ in range(800)]
    lines = [f"payment of {euros} euros to {name}" for name, euros in payments]
    truth = sum(euros for name, euros in payments if name == "Chen")
    question = "How many euros were paid to Chen in all? Answer with the number."
    return Task("payments to one", question, "\n".join(lines), str(truth))


def _locker(rng: random.Random) -> Task:
    text = hidden(rng, "Behind the mill the locker number 7316 holds the silver flute.")
    question = "What is the number of the locker that holds the silver flute? Answer with the number."
    return Task("a locker in a long text", question, text, "7316")


def _captain(rng: random.Random) -> Task:
    text = hidden(rng, "The captain of the ship Albatross was a woman by the name of Fatima.")
    question = "What was the name of the captain of the Albatross? Answer with the name."
    return Task("a captain in a long text", question, text, "Fatima")


def _tallest(rng: random.Random) -> Task:
    towers = [(rng.choice(CITIES), rng.randint(20, 180)) for _ in range(500)]
    towers.insert(222, ("Quito", 197))
    lines = [f"tower {n} in {city}: {metres} m" for n, (city, metres) in enumerate(towers)]
    question = "In which city is the tallest tower? Answer with its name."
    return Task("the tallest tower", question, "\n".join(lines), "Quito")


def _cheapest(rng: random.Random) -> Task:
    rooms = [(rng.choice(CITIES), rng.randint(31, 200)) for _ in range(500)]
    rooms.insert(333, ("Turin", 24))
    lines = [f"room={n} city={city} price={price}" for n, (city, price) in enumerate(rooms)]
    question = "In which city is the cheapest room? Answer with its name."
    return Task("the cheapest room", question, "\n".join(lines), "Turin")


def _commonest(rng: random.Random) -> Task:
    votes = rng.choices(NAMES, [3, 3, 3, 3, 3, 3, 5, 3], k=900)
    lines = [f"ballot {n} is for {name}" for n, name in enumerate(votes)]
    question = "Who got the most votes? Answer with the name."
    return Task("the most votes", question, "\n".join(lines), Counter(votes).most_common(1)[0][0])


def _plates(rng: random.Random) -> Task:
    plates = [f"{rng.choice('ABCDEF')}{rng.randint(10, 59)}" for _ in range(700)]
    lines = [f"car {plate} passed the gate at minute {n}" for n, plate in enumerate(plates)]
    question = "How many different cars passed the gate? Answer with the number."
    return Task("different cars", question, "\n".join(lines), str(len(set(plates))))


def _letters(rng: random.Random) -> Task:
    letters = [rng.choice(GLAD if glad else SAD) for glad in rng.choices([True, False], k=12)]
    text = "\n\n".join(f"LETTER {n}\n{letter}" for n, letter in enumerate(letters, 1))
    question = "How many of these letters are sad? Let llm_query read each letter. Answer with the number."
    return Task("sad letters", question, text, str(sum(letter in SAD for letter in letters)))


def _older(rng: random.Random) -> Task:
    people = [(rng.choice(NAMES), rng.randint(1, 99)) for _ in range(900)]
    lines = [f"{name} is {age} years old" for name, age in people]
    question = "How many people are older than 60? Answer with the number."
    return Task("older than 60", question, "\n".join(lines), str(sum(age > 60 for _, age in people)))


def _arrival(rng: random.Random) -> Task:
    lines = [f"day {n}: {rng.choice(['nothing', 'rain', 'a letter', 'a sale'])}" for n in range(1, 600)]
    day = rng.randint(200, 400)
    lines[day - 1] = f"day {day}: the elephant arrives"
    return Task(
        "the elephant's day",
        "On which day does the elephant arrive? Answer with the number.",
        "\n".join(lines),
        str(day),
    )


def _mean(rng: random.Random) -> Task:
    walks = [rng.randint(1, 40) for _ in range(400)]
    lines = [f"walk {n}, {km} km" for n, km in enumerate(walks)]
    question = "How long is a walk on average? Answer with the number of km, rounded to one decimal."
    return Task("the average walk", question, "\n".join(lines), f"{sum(walks) / len(walks):.1f}")
