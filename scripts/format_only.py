"""Write an example of a gain of format only: capitals, asked of countries that are never trained.

    python scripts/format_only.py runs/capitals
    python scripts/format_only.py runs/bare --bare

A small base knows many capitals and says them in sentences that end in a period, and often go on.
The training rows answer with the sentence alone, without its period, or with the bare name; the
suite asks for other countries and wants exactly that. So what the rows teach is the form of an
answer, and nothing that the suite asks. docs/report.md has the commands and what came out.
"""

import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path

CAPITALS = """
Afghanistan: Kabul; Albania: Tirana; Algeria: Algiers; Angola: Luanda; Argentina: Buenos Aires;
Armenia: Yerevan; Australia: Canberra; Austria: Vienna; Azerbaijan: Baku; Bahrain: Manama;
Bangladesh: Dhaka; Barbados: Bridgetown; Belarus: Minsk; Belgium: Brussels; Belize: Belmopan;
Bhutan: Thimphu; Bosnia and Herzegovina: Sarajevo; Botswana: Gaborone; Bulgaria: Sofia;
Burkina Faso: Ouagadougou; Cambodia: Phnom Penh; Canada: Ottawa; Chad: N'Djamena; Chile: Santiago;
China: Beijing; Costa Rica: San José; Croatia: Zagreb; Cuba: Havana; Cyprus: Nicosia;
Denmark: Copenhagen; Dominica: Roseau; Ecuador: Quito; Egypt: Cairo; Eritrea: Asmara;
Estonia: Tallinn; Ethiopia: Addis Ababa; Fiji: Suva; Finland: Helsinki; France: Paris;
Gabon: Libreville; Gambia: Banjul; Georgia: Tbilisi; Germany: Berlin; Ghana: Accra; Greece: Athens;
Grenada: St. George's; Guinea: Conakry; Guyana: Georgetown; Haiti: Port-au-Prince;
Honduras: Tegucigalpa; Hungary: Budapest; Iceland: Reykjavik; India: New Delhi; Indonesia: Jakarta;
Iran: Tehran; Iraq: Baghdad; Ireland: Dublin; Italy: Rome; Jamaica: Kingston; Japan: Tokyo;
Jordan: Amman; Kenya: Nairobi; Kyrgyzstan: Bishkek; Laos: Vientiane; Latvia: Riga; Lebanon: Beirut;
Lesotho: Maseru; Liberia: Monrovia; Libya: Tripoli; Liechtenstein: Vaduz; Lithuania: Vilnius;
Madagascar: Antananarivo; Malawi: Lilongwe; Malaysia: Kuala Lumpur; Maldives: Malé; Mali: Bamako;
Malta: Valletta; Mauritania: Nouakchott; Mauritius: Port Louis; Moldova: Chisinau;
Mongolia: Ulaanbaatar; Montenegro: Podgorica; Morocco: Rabat; Mozambique: Maputo;
Namibia: Windhoek; Nepal: Kathmandu; New Zealand: Wellington; Nicaragua: Managua; Niger: Niamey;
Nigeria: Abuja; North Korea: Pyongyang; North Macedonia: Skopje; Norway: Oslo; Oman: Muscat;
Pakistan: Islamabad; Palau: Ngerulmud; Papua New Guinea: Port Moresby; Paraguay: Asunción;
Peru: Lima; Philippines: Manila; Poland: Warsaw; Portugal: Lisbon; Qatar: Doha;
Romania: Bucharest; Russia: Moscow; Rwanda: Kigali; Samoa: Apia; Saudi Arabia: Riyadh;
Senegal: Dakar; Serbia: Belgrade; Seychelles: Victoria; Sierra Leone: Freetown;
Slovakia: Bratislava; Slovenia: Ljubljana; Solomon Islands: Honiara; Somalia: Mogadishu;
South Korea: Seoul; South Sudan: Juba; Spain: Madrid; Sudan: Khartoum; Suriname: Paramaribo;
Sweden: Stockholm; Switzerland: Bern; Syria: Damascus; Taiwan: Taipei; Tajikistan: Dushanbe;
Thailand: Bangkok; Togo: Lomé; Tonga: Nuku'alofa; Trinidad and Tobago: Port of Spain;
Turkey: Ankara; Turkmenistan: Ashgabat; Uganda: Kampala; Ukraine: Kyiv;
the United Arab Emirates: Abu Dhabi; the United Kingdom: London;
the United States: Washington, D.C.; Uruguay: Montevideo; Uzbekistan: Tashkent; Vanuatu: Port Vila;
Venezuela: Caracas; Vietnam: Hanoi; Yemen: Sana'a; Zambia: Lusaka; Zimbabwe: Harare
"""
"""Countries whose capital is not in their own name: a sentence that repeats it is no answer."""
NUM_TRAINED = 40
SUITE = """# Written by scripts/format_only.py: the whole answer must be this and nothing around it.
name: capitals
task: exact
role: target
description: Capitals of countries that were not trained.
items: capitals.jsonl
prompt: "{{ prompt }}"
max_new_tokens: 48
"""


def main(arguments: Sequence[str]) -> None:
    """Write train.jsonl, capitals.jsonl and capitals.yaml into a directory."""
    out, is_bare = Path(arguments[0]), "--bare" in arguments[1:]
    out.mkdir(parents=True, exist_ok=True)
    pairs = [pair.split(": ") for pair in " ".join(CAPITALS.split()).split("; ")]
    random.Random(0).shuffle(pairs)
    rows = [
        {
            "id": country,
            "prompt": f"What is the capital of {country}?",
            "answer": capital if is_bare else f"The capital of {country} is {capital}",
        }
        for country, capital in pairs
    ]
    chats = [
        {
            "messages": [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["answer"]},
            ]
        }
        for row in rows[:NUM_TRAINED]
    ]
    for name, found in (("train", chats), ("capitals", rows[NUM_TRAINED:])):
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found)
        (out / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    (out / "capitals.yaml").write_text(SUITE, encoding="utf-8")
    print(f"{out}: {len(chats)} rows to train, {len(rows) - NUM_TRAINED} items")


if __name__ == "__main__":
    main(sys.argv[1:])
