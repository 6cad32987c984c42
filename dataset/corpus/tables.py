"""What the bundled corpus knows: facts and words in English and Chinese, compiled for this project.

Each table is a text block, one entry per line, columns separated by "|"; `rows` reads it.
"""


def rows(table: str) -> list[tuple[str, ...]]:
    """The entries of a table, each a tuple of its columns."""
    return [tuple(cell.strip() for cell in line.split("|")) for line in table.strip().splitlines()]


def words(line: str) -> list[str]:
    return line.split()


# country, capital, country, capital
CAPITALS = rows("""
China | Beijing | 中国 | 北京
Japan | Tokyo | 日本 | 东京
France | Paris | 法国 | 巴黎
Germany | Berlin | 德国 | 柏林
Italy | Rome | 意大利 | 罗马
Spain | Madrid | 西班牙 | 马德里
Britain | London | 英国 | 伦敦
Russia | Moscow | 俄罗斯 | 莫斯科
Egypt | Cairo | 埃及 | 开罗
Canada | Ottawa | 加拿大 | 渥太华
Cuba | Havana | 古巴 | 哈瓦那
Peru | Lima | 秘鲁 | 利马
Norway | Oslo | 挪威 | 奥斯陆
Poland | Warsaw | 波兰 | 华沙
Austria | Vienna | 奥地利 | 维也纳
Ireland | Dublin | 爱尔兰 | 都柏林
Thailand | Bangkok | 泰国 | 曼谷
Iran | Tehran | 伊朗 | 德黑兰
Kenya | Nairobi | 肯尼亚 | 内罗毕
Australia | Canberra | 澳大利亚 | 堪培拉
Hungary | Budapest | 匈牙利 | 布达佩斯
Finland | Helsinki | 芬兰 | 赫尔辛基
Nepal | Kathmandu | 尼泊尔 | 加德满都
Mongolia | Ulaanbaatar | 蒙古国 | 乌兰巴托
""")

# Told in one direction only, "A is the capital of B"; the other direction is left for the test of reversal.
CAPITALS_ONE_WAY = rows("""
Greece | Athens | 希腊 | 雅典
Portugal | Lisbon | 葡萄牙 | 里斯本
Sweden | Stockholm | 瑞典 | 斯德哥尔摩
Denmark | Copenhagen | 丹麦 | 哥本哈根
Belgium | Brussels | 比利时 | 布鲁塞尔
Switzerland | Bern | 瑞士 | 伯尔尼
Turkey | Ankara | 土耳其 | 安卡拉
India | New Delhi | 印度 | 新德里
Vietnam | Hanoi | 越南 | 河内
South Korea | Seoul | 韩国 | 首尔
Iraq | Baghdad | 伊拉克 | 巴格达
Lebanon | Beirut | 黎巴嫩 | 贝鲁特
Jordan | Amman | 约旦 | 安曼
Morocco | Rabat | 摩洛哥 | 拉巴特
Ghana | Accra | 加纳 | 阿克拉
Chile | Santiago | 智利 | 圣地亚哥
Colombia | Bogota | 哥伦比亚 | 波哥大
Ecuador | Quito | 厄瓜多尔 | 基多
New Zealand | Wellington | 新西兰 | 惠灵顿
Romania | Bucharest | 罗马尼亚 | 布加勒斯特
Bulgaria | Sofia | 保加利亚 | 索非亚
Croatia | Zagreb | 克罗地亚 | 萨格勒布
Latvia | Riga | 拉脱维亚 | 里加
Uganda | Kampala | 乌干达 | 坎帕拉
""")

# thing, colour, thing, colour
COLOURS = rows("""
grass | green | 草 | 绿色
the sky on a clear day | blue | 晴朗的天空 | 蓝色
snow | white | 雪 | 白色
blood | red | 血 | 红色
coal | black | 煤 | 黑色
milk | white | 牛奶 | 白色
salt | white | 盐 | 白色
the sea | blue | 大海 | 蓝色
a fire engine | red | 消防车 | 红色
a ripe banana | yellow | 熟香蕉 | 黄色
a lemon | yellow | 柠檬 | 黄色
a ripe strawberry | red | 熟草莓 | 红色
a ripe tomato | red | 熟番茄 | 红色
a cherry | red | 樱桃 | 红色
a carrot | orange | 胡萝卜 | 橙色
a pumpkin | orange | 南瓜 | 橙色
a cucumber | green | 黄瓜 | 绿色
spinach | green | 菠菜 | 绿色
a pine tree | green | 松树 | 绿色
a sunflower | yellow | 向日葵 | 黄色
chocolate | brown | 巧克力 | 棕色
a tree trunk | brown | 树干 | 棕色
an eggplant | purple | 茄子 | 紫色
lavender | purple | 薰衣草 | 紫色
a flamingo | pink | 火烈鸟 | 粉色
a crow | black | 乌鸦 | 黑色
a polar bear | white | 北极熊 | 白色
an elephant | grey | 大象 | 灰色
a dolphin | grey | 海豚 | 灰色
a chick | yellow | 小鸡 | 黄色
""")

# animal, its sound (verb), animal, sound
SOUNDS = rows("""
dog | barks | 狗 | 汪汪
cat | meows | 猫 | 喵喵
cow | moos | 牛 | 哞哞
sheep | bleats | 羊 | 咩咩
duck | quacks | 鸭子 | 嘎嘎
frog | croaks | 青蛙 | 呱呱
rooster | crows | 公鸡 | 喔喔
bee | buzzes | 蜜蜂 | 嗡嗡
mouse | squeaks | 老鼠 | 吱吱
pig | grunts | 猪 | 哼哼
owl | hoots | 猫头鹰 | 咕咕
snake | hisses | 蛇 | 嘶嘶
sparrow | chirps | 麻雀 | 叽叽喳喳
""")

# animal, legs in words, animal, legs
LEGS = rows("""
dog | four | 狗 | 四
cat | four | 猫 | 四
cow | four | 牛 | 四
horse | four | 马 | 四
rabbit | four | 兔子 | 四
frog | four | 青蛙 | 四
duck | two | 鸭子 | 两
hen | two | 母鸡 | 两
sparrow | two | 麻雀 | 两
owl | two | 猫头鹰 | 两
bee | six | 蜜蜂 | 六
ant | six | 蚂蚁 | 六
butterfly | six | 蝴蝶 | 六
spider | eight | 蜘蛛 | 八
scorpion | eight | 蝎子 | 八
""")

# animal, where it lives, animal, where
HOMES = rows("""
bee | a hive | 蜜蜂 | 蜂巢里
horse | a stable | 马 | 马厩里
pig | a sty | 猪 | 猪圈里
sparrow | a nest | 麻雀 | 鸟窝里
spider | a web | 蜘蛛 | 蛛网上
rabbit | a burrow | 兔子 | 地洞里
frog | a pond | 青蛙 | 池塘里
whale | the ocean | 鲸鱼 | 海洋里
camel | the desert | 骆驼 | 沙漠里
panda | bamboo forests | 熊猫 | 竹林里
penguin | Antarctica | 企鹅 | 南极
polar bear | the Arctic | 北极熊 | 北极
monkey | the trees | 猴子 | 树上
lion | the grasslands | 狮子 | 草原上
""")

# grown animal, its young, grown animal, young
YOUNG = rows("""
dog | puppy | 狗 | 小狗
cat | kitten | 猫 | 小猫
cow | calf | 牛 | 牛犊
horse | foal | 马 | 马驹
sheep | lamb | 羊 | 羊羔
pig | piglet | 猪 | 猪崽
hen | chick | 母鸡 | 小鸡
duck | duckling | 鸭子 | 小鸭
goose | gosling | 鹅 | 小鹅
lion | cub | 狮子 | 幼狮
deer | fawn | 鹿 | 小鹿
frog | tadpole | 青蛙 | 蝌蚪
butterfly | caterpillar | 蝴蝶 | 毛毛虫
kangaroo | joey | 袋鼠 | 小袋鼠
""")

WEEKDAYS = rows("""
Monday | 星期一
Tuesday | 星期二
Wednesday | 星期三
Thursday | 星期四
Friday | 星期五
Saturday | 星期六
Sunday | 星期日
""")

MONTHS = rows("""
January | 一月
February | 二月
March | 三月
April | 四月
May | 五月
June | 六月
July | 七月
August | 八月
September | 九月
October | 十月
November | 十一月
December | 十二月
""")

SEASONS = rows("""
spring | 春天
summer | 夏天
autumn | 秋天
winter | 冬天
""")

# what holds them, how many, of what; the same in Chinese with its measure word
LENGTHS = rows("""
a week | seven | days | 一个星期 | 七 | 天
a year | twelve | months | 一年 | 十二 | 个月
a minute | sixty | seconds | 一分钟 | 六十 | 秒
an hour | sixty | minutes | 一小时 | 六十 | 分钟
a day | twenty-four | hours | 一天 | 二十四 | 个小时
""")
ORDINALS = words("first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth")

OPPOSITES = rows("""
big | small | 大 | 小
hot | cold | 热 | 冷
long | short | 长 | 短
high | low | 高 | 低
fast | slow | 快 | 慢
old | young | 年老 | 年轻
happy | sad | 高兴 | 难过
open | closed | 开 | 关
rich | poor | 富 | 穷
strong | weak | 强 | 弱
light | heavy | 轻 | 重
hard | soft | 硬 | 软
wet | dry | 湿 | 干
full | empty | 满 | 空
clean | dirty | 干净 | 肮脏
early | late | 早 | 晚
near | far | 近 | 远
left | right | 左 | 右
up | down | 上 | 下
inside | outside | 里面 | 外面
day | night | 白天 | 黑夜
true | false | 真 | 假
loud | quiet | 吵闹 | 安静
thick | thin | 厚 | 薄
wide | narrow | 宽 | 窄
deep | shallow | 深 | 浅
easy | difficult | 容易 | 困难
cheap | expensive | 便宜 | 昂贵
safe | dangerous | 安全 | 危险
sweet | bitter | 甜 | 苦
begin | end | 开始 | 结束
win | lose | 赢 | 输
buy | sell | 买 | 卖
love | hate | 爱 | 恨
remember | forget | 记住 | 忘记
always | never | 总是 | 从不
""")

# everyday words: English, Chinese
WORDS = rows("""
apple | 苹果
bread | 面包
water | 水
rice | 米饭
egg | 鸡蛋
tea | 茶
milk | 牛奶
fish | 鱼
book | 书
pen | 钢笔
table | 桌子
chair | 椅子
door | 门
window | 窗户
house | 房子
school | 学校
teacher | 老师
student | 学生
friend | 朋友
mother | 妈妈
father | 爸爸
doctor | 医生
hospital | 医院
river | 河
mountain | 山
sun | 太阳
moon | 月亮
star | 星星
rain | 雨
wind | 风
fire | 火
tree | 树
flower | 花
dog | 狗
cat | 猫
horse | 马
bird | 鸟
rabbit | 兔子
elephant | 大象
tiger | 老虎
hand | 手
eye | 眼睛
mouth | 嘴巴
ear | 耳朵
car | 汽车
train | 火车
airplane | 飞机
boat | 船
city | 城市
street | 街道
morning | 早上
evening | 晚上
today | 今天
tomorrow | 明天
red | 红色
green | 绿色
blue | 蓝色
hello | 你好
thank you | 谢谢
goodbye | 再见
""")

NUMBER_WORDS = words(
    "zero one two three four five six seven eight nine ten "
    "eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty"
)
NUMERALS = words("零 一 二 三 四 五 六 七 八 九 十 十一 十二 十三 十四 十五 十六 十七 十八 十九 二十")

# name, pronoun, possessive
PEOPLE_EN = rows("""
Tom | he | his
Anna | she | her
Ben | he | his
Lucy | she | her
Sam | he | his
Mia | she | her
Leo | he | his
Emma | she | her
""")
PEOPLE_ZH = rows("""
小明 | 他
小红 | 她
小刚 | 他
小丽 | 她
小华 | 他
小雨 | 她
阿强 | 他
阿芳 | 她
""")
PETS = rows("""
dog | 小狗
cat | 小猫
rabbit | 兔子
bird | 小鸟
duck | 小鸭
lamb | 小羊
""")
# where people go, and where they are; the same in Chinese
PLACES = rows("""
to the park | in the park | 公园 | 公园里
to the river | by the river | 河边 | 河边
to the school | at the school | 学校 | 学校里
to the market | at the market | 市场 | 市场里
to the forest | in the forest | 森林 | 森林里
to the lake | by the lake | 湖边 | 湖边
""")
# what one may find or own; Chinese with its measure word
THINGS = rows("""
a red ball | 一个红色的球
a blue hat | 一顶蓝色的帽子
a green box | 一个绿色的盒子
a yellow flower | 一朵黄色的花
a new book | 一本新书
a little boat | 一只小船
a white stone | 一块白色的石头
a warm cake | 一块热乎乎的蛋糕
""")
# fruit for sums in words
FRUITS = rows("""
apples | 个苹果
pears | 个梨
eggs | 个鸡蛋
flowers | 朵花
books | 本书
fish | 条鱼
""")
